"""
Whole models: one BF16 layer among MXFP8 ones, and dense weights quantized on load, run through the reference kernel.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from mx_files import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.plugins import build_registry
from quantplug_mx import plugin
from quantplug_transformers import from_pretrained

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REGISTRY = build_registry({"quantplug-mx": plugin})
IDS = torch.arange(1, 25)[None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run tiny products on one thread: waking a second one takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Write a random model of 11 layers, so that layer 1 has 10 beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=11, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    directory = tmp_path_factory.mktemp("dense")
    model.save_pretrained(directory)
    return directory


def rounded(dense: Path, whole: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a model's stored tensors with its linear layers in MXFP8 but for one layer, and its values in float32."""
    stored, values = {}, {}
    scheme = build("mxfp8", scale_name="weight_scale_inv")
    for key, tensor in load_file(dense / "model.safetensors").items():
        path = key.removesuffix(".weight")
        if path.endswith("_proj") and not path.startswith(whole):
            weight = scheme.quantize(tensor)
            stored |= {f"{path}.{suffix}": part for suffix, part in scheme.encode(weight).items()}
            values[key] = weight.dequantize()
        else:
            stored[key] = tensor
            values[key] = tensor.float()
    return stored, values


def logits_of(dense: Path, values: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.load_state_dict(values)
    with torch.no_grad():
        return model(IDS).logits


def test_a_mixed_model_gives_the_logits_of_its_own_dequantized_weights(dense, tmp_path):
    """To the bit, in float32: the same products of the same numbers. `model.layers.1.` leaves 10 quantized."""
    stored, values = rounded(dense, "model.layers.1.")
    config = json.loads((dense / "config.json").read_text())
    section = {"quant_method": "mxfp8", "modules_to_not_convert": ["lm_head", "model.layers.1."]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    model = from_pretrained(tmp_path, dtype="float32", strict=True, registry=REGISTRY)
    quantized = {layer.path for layer in model.quantplug_plan.layers if layer.quantized}
    assert {path.split(".")[2] for path in quantized} == {str(number) for number in range(11) if number != 1}
    with torch.no_grad():
        found = model(IDS).logits
    assert torch.equal(found, logits_of(dense, values))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_dense_weights_are_quantized_on_load(name, dense):
    """By the name of the format, to the numbers that rounding each weight gives; the output head stays whole."""
    made = plan(dense, platform="cpu", quantize=name, registry=REGISTRY)
    modules = load_layers(made, dense, registry=REGISTRY).modules
    weights = load_file(dense / "model.safetensors")
    assert {f"{path}.weight" for path in modules} == {key for key in weights if key.endswith("_proj.weight")}
    for path, module in modules.items():
        assert torch.equal(module.dequantize(), build(name).quantize(weights[f"{path}.weight"]).dequantize())
