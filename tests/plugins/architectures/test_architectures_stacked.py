"""
Experts stored all in one tensor: in FP8, in MXFP4, dense; turned, alternating, as each family declares it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import EXPERTS, FAMILIES, HIDDEN, INNER, REFERENCE, anything, encoded, scheme_of

from quantplug.errors import CheckpointError
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.plugins import registry as installed
from quantplug.schemes import SchemeCache
from quantplug.skip import SchemeRef
from quantplug.spec import LinearShape

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MXFP4 = {"quant_method": "mxfp4"}


def joined(scheme, expert, *, interleaved):
    """Return the stored tensors of gate and up in one, and those of down, with what they decode to."""
    both = (
        torch.stack([expert.gate, expert.up], 1).flatten(0, 1) if interleaved else torch.cat([expert.gate, expert.up])
    )
    found = []
    for dense in (both, expert.down):
        stored = encoded(scheme, anything(scheme, dense))
        found.append((stored, scheme.decode(stored, LinearShape(*dense.shape), "test").dequantize()))
    return found


def write_stacked(tiny, directory, scheme, endings, *, interleaved=False):
    """
    Write the experts of every layer in one tensor each.

    Args:
        tiny: the model.
        directory: where its config.json is.
        scheme: what it is stored in.
        endings: how each suffix is spelled behind a projection's name.
        interleaved: whether rows of gate and up alternate.

    Returns:
        Values of the joined projection and of down, by container and expert.
    """
    state, written = dict(tiny.others), {}
    for container, experts in tiny.experts.items():
        parts = [joined(scheme, expert, interleaved=interleaved) for expert in experts]
        for number, name in enumerate(("gate_up_proj", "down_proj")):
            for suffix, ending in endings.items():
                tensor = torch.stack([part[number][0][suffix] for part in parts])
                state[f"{container}.{name}{ending}"] = tensor.unflatten(-1, (-1, 16)) if ending == "_blocks" else tensor
        if experts[0].biases:
            both = [torch.stack(expert.biases[:2], 1).flatten() for expert in experts]
            state[f"{container}.gate_up_proj_bias"] = torch.stack(both)
            state[f"{container}.down_proj_bias"] = torch.stack([expert.biases[2] for expert in experts])
        written[container] = [(part[0][1], part[1][1]) for part in parts]
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return written


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gemma4"])
@pytest.mark.parametrize("block", [[32, 32], [64, 64]])
def test_fp8_experts_as_transformers_stacks_them(family, block, models, tmp_path):
    """Blocks that lie across gate and up, too: 64 rows are both of them."""
    tiny, _ = models(family)
    scheme = scheme_of(tiny, tmp_path, {**FP8, "weight_block_size": block})
    written = write_stacked(tiny, tmp_path, scheme, {"weight": "", "weight_scale_inv": "_scale_inv"})
    made = plan(tmp_path, dtype="float32", policy=REFERENCE)
    assert not made.left
    loaded = load_layers(made, tmp_path)
    for container, weights in written.items():
        for number, (both, down) in enumerate(weights):
            w13, w2 = loaded.experts[container].dequantize(number)
            assert torch.equal(w13, both)
            assert torch.equal(w2, down)


def test_gpt_oss_as_it_is_released(models, tmp_path):
    """`_blocks` with an axis for the groups, `_scales`, `_bias`; rows of gate and up alternate."""
    tiny, _ = models("gpt_oss")
    scheme = scheme_of(tiny, tmp_path, MXFP4)
    written = write_stacked(
        tiny, tmp_path, scheme, {"weight_packed": "_blocks", "weight_scale_inv": "_scales"}, interleaved=True
    )
    made = plan(tmp_path, dtype="float32", policy=REFERENCE)
    assert made.dialect == "mxfp4"
    assert not made.left
    assert not [layer for layer in made.layers if layer.quantized and layer.kind != "experts"]
    loaded = load_layers(made, tmp_path)
    for container, weights in written.items():
        module = loaded.experts[container]
        held = dict(module.named_buffers())
        for number, (both, down) in enumerate(weights):
            w13, w2 = module.dequantize(number)
            assert torch.equal(w13, torch.cat([both[0::2], both[1::2]]))
            assert torch.equal(w2, down)
            gate_bias, up_bias, down_bias = tiny.experts[container][number].biases
            assert torch.equal(held["prepared_0_b13"][number], torch.cat([gate_bias, up_bias]).float())
            assert torch.equal(held["prepared_0_b2"][number], down_bias.float())


def test_gpt_oss_as_modelopt_writes_it(models, tmp_path):
    """NVFP4 with inputs first, and one number for all experts where the format has one for each."""
    tiny, _ = models("gpt_oss")
    scheme = scheme_of(tiny, tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    factor, state, written = torch.tensor(0.25), dict(tiny.others), {}
    for container, experts in tiny.experts.items():
        for name in ("gate_up_proj", "down_proj"):
            joint = name == "gate_up_proj"
            dense = [torch.stack([e.gate, e.up], 1).flatten(0, 1) if joint else e.down for e in experts]
            weights = [replace(anything(scheme, each), global_scale=factor) for each in dense]
            stored = [encoded(scheme, weight) for weight in weights]
            state[f"{container}.{name}"] = torch.stack([s["weight"].T for s in stored])
            state[f"{container}.{name}_weight_scale"] = torch.stack([s["weight_scale"].T for s in stored])
            state[f"{container}.{name}_weight_scale_2"] = factor.clone()
            state[f"{container}.{name}_input_scale"] = stored[0]["input_scale"].clone()
            biases = [torch.stack(e.biases[:2], 1).flatten() if joint else e.biases[2] for e in experts]
            state[f"{container}.{name}_bias"] = torch.stack(biases)
            written[container, name] = [weight.dequantize() for weight in weights]
    save_file(state, tmp_path / "model.safetensors")
    made = plan(tmp_path, dtype="float32", policy=REFERENCE)
    assert not made.left
    loaded = load_layers(made, tmp_path)
    for container in tiny.experts:
        module = loaded.experts[container]
        assert {source.name for source in module.sources} == {n for n in state if n.startswith(f"{container}.")}
        for number in range(EXPERTS):
            both, down = (written[container, name][number] for name in ("gate_up_proj", "down_proj"))
            w13, w2 = module.dequantize(number)
            assert torch.equal(w13, torch.cat([both[0::2], both[1::2]]))
            assert torch.equal(w2, down)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_file_plans_as_transformers_saves_it(family, models):
    """Experts are found in it, and stay whole; no tensor is left."""
    tiny, directory = models(family)
    made = plan(directory, platform="cpu")
    experts = {layer.path: layer for layer in made.layers if layer.kind == "experts"}
    assert list(experts) == list(tiny.experts)
    assert not any(layer.quantized for layer in made.layers)
    assert not made.left
    for layer in experts.values():
        assert layer.experts.count == EXPERTS
        assert set(layer.tensors) == {name for name in tiny.state if name.startswith(f"{layer.path}.")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_file_is_quantized_on_load_in_its_own_order(family, models):
    """Turned, joined or alternating: what is quantized are the rows that the model's forward pass multiplies with."""
    tiny, directory = models(family)
    made = plan(directory, dtype="float32", policy=REFERENCE, quantize="mxfp8")
    loaded = load_layers(made, directory)
    scheme = SchemeCache(installed()).get(SchemeRef("mxfp8"), "test")
    for container, experts in tiny.experts.items():
        module = loaded.experts[container]
        assert (module.problem.hidden, module.problem.intermediate) == (HIDDEN, INNER)
        for number, expert in enumerate(experts):
            w13, w2 = module.dequantize(number)
            assert torch.equal(w13, scheme.quantize(torch.cat([expert.gate, expert.up])).dequantize())
            assert torch.equal(w2, scheme.quantize(expert.down).dequantize())


def test_a_stacked_tensor_of_another_number_of_experts_is_refused(models, tmp_path):
    """It says which tensor, and how many there must be."""
    tiny, _ = models("qwen3_moe")
    scheme = scheme_of(tiny, tmp_path, FP8, num_experts=EXPERTS + 1)
    write_stacked(tiny, tmp_path, scheme, {"weight": "", "weight_scale_inv": "_scale_inv"})
    with pytest.raises(
        CheckpointError, match=r"experts\.gate_up_proj.*expected 5 experts along the first axis"
    ) as caught:
        plan(tmp_path, platform="cpu")
    assert caught.value.code == "QP-ST-SHAPE"


@pytest.mark.parametrize(
    ("drop", "code"), [("gate_up_proj_scale_inv", "QP-ST-MISSING"), ("down_proj", "QP-ST-MISSING")]
)
def test_a_stacked_tensor_that_is_missing_is_named(drop, code, models, tmp_path):
    """Whether it is a scale or a weight."""
    tiny, _ = models("gemma4")
    scheme = scheme_of(tiny, tmp_path, FP8)
    write_stacked(tiny, tmp_path, scheme, {"weight": "", "weight_scale_inv": "_scale_inv"})
    state = load_file(tmp_path / "model.safetensors")
    del state[f"model.layers.1.experts.{drop}"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layers\.1\.experts\.{drop.removesuffix('_scale_inv')}") as caught:
        plan(tmp_path, platform="cpu")
    assert caught.value.code == code


def test_scales_apart_from_the_weights_that_they_belong_to_are_refused(models, tmp_path):
    """As save_pretrained of Transformers 5.23 writes FP8 experts by default, and reads them back without scales."""
    tiny, _ = models("qwen3_moe")
    scheme = scheme_of(tiny, tmp_path, FP8)
    write_stacked(tiny, tmp_path, scheme, {"weight": "", "weight_scale_inv": "_scale_inv"})
    state = load_file(tmp_path / "model.safetensors")
    for container in tiny.experts:
        both, down = (state.pop(f"{container}.{name}") for name in ("gate_up_proj", "down_proj"))
        for expert in range(EXPERTS):
            parts = {"gate_proj": both[expert, :INNER], "up_proj": both[expert, INNER:], "down_proj": down[expert]}
            state |= {f"{container}.{expert}.{name}.weight": part.clone() for name, part in parts.items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="down_proj_scale_inv, gate_up_proj_scale_inv of all experts") as caught:
        plan(tmp_path, platform="cpu")
    assert caught.value.code == "QP-ST-MISSING"
    assert "save_original_format=False" in caught.value.fix


def test_a_name_that_no_rule_of_the_family_declares_is_refused(models, tmp_path):
    """Nothing is inferred from its shape."""
    tiny, _ = models("qwen3_moe")
    scheme = scheme_of(tiny, tmp_path, FP8)
    write_stacked(tiny, tmp_path, scheme, {"weight": "", "weight_scale_inv": "_scale_inv"})
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.experts.w13"] = state.pop("model.layers.1.mlp.experts.gate_up_proj")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no name rule of its family says how its experts lie") as caught:
        plan(tmp_path, platform="cpu")
    assert caught.value.code == "QP-ST-DTYPE"
