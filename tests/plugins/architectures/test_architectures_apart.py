"""
Experts stored one by one: every family, every suffix, every spelling; loaded, each is what was written, to the bit.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import EXPERTS, FAMILIES, HIDDEN, INNER, REFERENCE, anything, scheme_of, write_apart

from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug_architectures.plugin import quantplug_architectures


def _ct(form, weights, activations=None):
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    group |= {"input_activations": {"symmetric": True, **activations}} if activations else {}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": [], "config_groups": {"group_0": group}}


_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FORMATS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "fp8_block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "fp8_static": _ct(
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    ),
    "int8_channel": _ct(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "w4a16": _ct("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "nvfp4": _ct("nvfp4-pack-quantized", _NVFP4, {**_NVFP4, "dynamic": "local"}),
    "mxfp8": {"quant_method": "mxfp8"},
}  # fmt: skip
SUFFIXES = {
    "gptq": {"qweight", "qzeros", "scales", "g_idx"},
    "awq": {"qweight", "qzeros", "scales"},
    "fp8_block": {"weight", "weight_scale_inv"},
    "fp8_static": {"weight", "weight_scale", "input_scale"},
    "int8_channel": {"weight", "weight_scale"},
    "w4a16": {"weight_packed", "weight_scale", "weight_shape"},
    "nvfp4": {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"},
    "mxfp8": {"weight", "weight_scale_inv"},
}


def check(directory, written, experts=None):
    """Plan and load; every expert's values are those written, its biases too."""
    made = plan(directory, dtype="float32", policy=REFERENCE)
    loaded = load_layers(made, directory)
    assert list(loaded.experts) == list(written)
    for path, weights in written.items():
        module = loaded.experts[path]
        assert (module.problem.experts, module.problem.hidden, module.problem.intermediate) == (EXPERTS, HIDDEN, INNER)
        for number, (gate, up, down) in enumerate(weights):
            w13, w2 = module.dequantize(number)
            assert torch.equal(w13, torch.cat([gate.dequantize(), up.dequantize()]))
            assert torch.equal(w2, down.dequantize())
            if experts is not None and experts[path][number].biases:
                gate_bias, up_bias, down_bias = experts[path][number].biases
                held = dict(module.named_buffers())
                assert torch.equal(held["prepared_0_b13"][number], torch.cat([gate_bias, up_bias]).float())
                assert torch.equal(held["prepared_0_b2"][number], down_bias.float())
    return made, loaded


@pytest.mark.parametrize("name", FORMATS)
def test_every_suffix_of_every_format_reaches_its_expert(name, models, tmp_path):
    """Scalars and vectors among them; none is left, none is read for another expert."""
    tiny, _ = models("qwen3_moe")
    written = write_apart(tiny, tmp_path, scheme_of(tiny, tmp_path, FORMATS[name]), make=anything)
    made, loaded = check(tmp_path, written)
    layer = made.layer("model.layers.1.mlp.experts")
    assert {suffix for segment in layer.segments for suffix, _ in segment.tensors} == SUFFIXES[name]
    assert not made.left
    assert not loaded.modules


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "w4a16"), ("deepseek_v2", "gptq"), ("deepseek_v3", "fp8_block"), ("glm4_moe", "fp8_static"),
        ("gpt_oss", "gptq"), ("gpt_oss", "w4a16"), ("gemma4", "nvfp4"), ("llama4", "mxfp8"),
    ],
)  # fmt: skip
def test_every_family_finds_its_experts(family, name, models, tmp_path):
    """In its own place, with its own fields of config.json, with biases where it has some."""
    tiny, _ = models(family)
    written = write_apart(tiny, tmp_path, scheme_of(tiny, tmp_path, FORMATS[name]), make=anything)
    made, _ = check(tmp_path, written, tiny.experts)
    problem = made.layer(next(iter(written))).problem
    assert problem.top_k == (1 if family == "llama4" else 2)
    assert problem.router_weight_on_input == (family == "llama4")
    assert problem.bias == (family == "gpt_oss")
    assert problem.function.describe() == {
        "gpt_oss": "silu, gated, limit 5, alpha 1.702, up + 1",  # 5 is what this config.json says
        "gemma4": "gelu_tanh, gated",
    }.get(family, "silu, gated")


@pytest.mark.parametrize(
    ("names", "parent"),
    [
        (("w1", "w3", "w2"), "block_sparse_moe"),
        (("gate_proj", "up_proj", "down_proj"), "block_sparse_moe"),
        (("gate_proj", "up_proj", "down_proj"), "mlp"),
    ],
)
def test_mixtral_is_read_in_three_spellings(names, parent, models, tmp_path):
    """Transformers', llm-compressor's and GPTQModel's."""
    tiny, _ = models("mixtral")
    scheme = scheme_of(tiny, tmp_path, FORMATS["gptq"])
    written = write_apart(tiny, tmp_path, scheme, names, place=lambda path: path.replace("block_sparse_moe", parent))
    check(tmp_path, written)
    assert list(written) == [f"model.layers.{number}.{parent}.experts" for number in range(2)]


def test_listed_groups_and_zero_points_are_each_experts_own(models, tmp_path):
    """GPTQ with act-order: every projection of every expert has another g_idx."""
    tiny, _ = models("qwen3_moe")
    scheme = scheme_of(tiny, tmp_path, {**FORMATS["gptq"], "desc_act": True, "sym": False})
    written = write_apart(tiny, tmp_path, scheme, make=anything)
    assert not torch.equal(*(written["model.layers.0.mlp.experts"][number][0].g_idx for number in (0, 1)))
    made, _ = check(tmp_path, written)
    assert made.layer("model.layers.0.mlp.experts").problem.w13[0].act_order


@pytest.mark.parametrize("family", ["mixtral", "gemma4"])
def test_text_models_within_others_are_found(family, models, tmp_path):
    """By the model_type of text_config, where what the experts are is said, too."""
    tiny, _ = models(family)
    outer = {"model_type": "something_vl", "text_config": tiny.config}
    scheme = scheme_of(tiny, tmp_path, FORMATS["fp8_block"])
    quantization = FORMATS["fp8_block"]
    (tmp_path / "config.json").write_text(json.dumps({**outer, "quantization_config": quantization}))
    written = write_apart(
        tiny,
        tmp_path,
        scheme,
        make=anything,
        place=lambda path: path.replace("model.layers", "model.language_model.layers"),
    )
    made, _ = check(tmp_path, written)
    gelu = made.layer(next(iter(written))).problem.function.name == "gelu_tanh"
    assert gelu == (family == "gemma4")


def test_every_described_family_is_tried():
    """The table of models here is that of the plugin, but for dense ones and those that are laid out alike."""
    described = {model_type for family in quantplug_architectures() for model_type in family.model_types}
    assert described - set(FAMILIES) == {"llama", "mistral", "qwen3", "kimi_k2", "gemma4_text", "llama4_text"}
