"""
Checkpoints in ModelOpt's layouts from planning to values, against a decoding in NumPy that shares nothing with ours.

The stored bytes follow the rules of ModelOpt's exporter (`to_quantized_weight` and what it calls): `weight_scale`
(times `weight_scale_2`) multiplies the codes, and two 4-bit codes share a byte, the even input in the lower nibble.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import quantplug
from quantplug.errors import CheckpointError, ConfigError
from quantplug.policy import Policy

N, K = 128, 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GENERATOR = torch.Generator().manual_seed(11)
PATHS = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")


def codes(dtype, *shape):
    """Random finite codes of an 8-bit float, or whole bytes."""
    stored = torch.randint(0, 256, shape, generator=GENERATOR, dtype=torch.uint8)
    if dtype == torch.uint8:
        return stored
    if dtype == torch.int8:
        return stored.view(torch.int8)
    stored = torch.where(stored & 0x7F == 0x7F, torch.zeros_like(stored), stored)
    return stored.view(dtype)


def scales(*shape):
    return torch.rand(shape, generator=GENERATOR) * 0.01 + 0.001


def as_float64(tensor):
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return tensor.numpy().astype(np.float64)


def nibbles(packed):
    flat = packed.numpy()
    return E2M1[np.stack([flat & 15, flat >> 4], -1).reshape(flat.shape[0], -1)]


def layer(algo):
    """Return the stored tensors of one layer and its values in float64."""
    one = torch.tensor(0.37)
    if algo == "FP8":
        stored = {"weight": codes(torch.float8_e4m3fn, N, K), "weight_scale": scales()[()], "input_scale": one}
        return stored, as_float64(stored["weight"]) * float(stored["weight_scale"])
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        stored = {"weight": codes(torch.float8_e4m3fn, N, K), "weight_scale": scales(N)}
        return stored, as_float64(stored["weight"]) * as_float64(stored["weight_scale"])[:, None]
    if algo == "FP8_PB_WO":
        stored = {"weight": codes(torch.float8_e4m3fn, N, K), "weight_scale": scales(N // 128, 1, K // 128, 1)}
        blocks = as_float64(stored["weight_scale"]).reshape(N // 128, K // 128)
        return stored, as_float64(stored["weight"]) * blocks.repeat(128, 0).repeat(128, 1)
    if algo in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        stored = {"weight": codes(torch.int8, N, K), "weight_scale": scales(N)}
        stored |= {"input_scale": one} if algo.startswith("W8A8") else {}
        return stored, as_float64(stored["weight"]) * as_float64(stored["weight_scale"])[:, None]
    if algo == "MXFP8":
        powers = torch.randint(110, 130, (N, K // 32), generator=GENERATOR, dtype=torch.uint8)
        stored = {"weight": codes(torch.float8_e4m3fn, N, K), "weight_scale": powers}
        return stored, as_float64(stored["weight"]) * (2.0 ** (as_float64(powers) - 127)).repeat(32, 1)
    if "MXFP4" in algo:
        powers = torch.randint(110, 130, (N, K // 32), generator=GENERATOR, dtype=torch.uint8)
        stored = {"weight": codes(torch.uint8, N, K // 2), "weight_scale": powers}
        return stored, nibbles(stored["weight"]) * (2.0 ** (as_float64(powers) - 127)).repeat(32, 1)
    group = (torch.rand(N, K // 16, generator=GENERATOR) * 400 + 1).to(torch.float8_e4m3fn)
    stored = {"weight": codes(torch.uint8, N, K // 2), "weight_scale": group, "weight_scale_2": scales()[()] * 0.01}
    stored |= {} if algo.startswith("W4A16") else {"input_scale": one}
    # Scale and factor are multiplied first and rounded to float32, as ModelOpt does.
    product = (as_float64(group) * float(stored["weight_scale_2"])).astype(np.float32).astype(np.float64)
    return stored, nibbles(stored["weight"]) * product.repeat(16, 1)


ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W8A16", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "NVFP4",
    "W4A16_NVFP4", "W4A8_NVFP4_FP8", "W8A8_SQ_PER_CHANNEL",
)  # fmt: skip


def write(directory, layers, quantization, dense=(), beside=None):
    tensors = {
        f"{path}.{suffix}": tensor.contiguous() for path, stored in layers.items() for suffix, tensor in stored.items()
    }
    tensors |= {f"{path}.weight": torch.ones(8, 16, dtype=torch.bfloat16) for path in ("model.embed_tokens", *dense)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
    config |= {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps(beside))
    return directory


# The reference kernel keeps the canonical form, so that values are those of the format and of no kernel.
REFERENCE = Policy.parse({"rule": [{"pin": "reference"}]}, "test")


def values(directory):
    """Return the plan, and every quantized layer's values in float32."""
    plan = quantplug.plan(directory, platform="cpu", probe=False, policy=REFERENCE)
    loaded = quantplug.load_layers(plan, directory)
    return plan, {path: module.dequantize(torch.float32) for path, module in loaded.modules.items()}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_layout_decodes_to_the_values_of_an_independent_reading(tmp_path, algo):
    stored, want = layer(algo)
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algo, "exclude_modules": ["lm_head"]}}
    plan, found = values(write(tmp_path, {PATHS[0]: stored}, None, ("lm_head",), beside))
    assert all("slow reference kernel" in warning for warning in plan.warnings)
    # One product of two float32 numbers, rounded once: half a unit in the last place.
    np.testing.assert_allclose(found[PATHS[0]].numpy(), want, rtol=2**-24, atol=2**-150)
    assert not plan.layer("lm_head").quantized


def test_inputs_that_a_stored_scale_multiplies_are_not_passed_over(tmp_path):
    stored, _ = layer("W8A8_SQ_PER_CHANNEL")
    stored["pre_quant_scale"] = torch.ones(K, dtype=torch.bfloat16)
    directory = write(tmp_path, {PATHS[0]: stored}, {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"})
    with pytest.raises(CheckpointError, match="pre_quant_scale") as raised:
        quantplug.plan(directory, platform="cpu", probe=False)
    assert raised.value.code == "QP-ST-EXTRA"


def test_a_mixed_file_decodes_each_layer_by_its_own_algorithm(tmp_path):
    made = {PATHS[0]: layer("FP8"), PATHS[1]: layer("NVFP4")}
    section = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {PATHS[0]: {"quant_algo": "FP8"}, PATHS[1]: {"quant_algo": "NVFP4", "group_size": 16}},
        "ignore": [],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }
    layers = {path: stored for path, (stored, _) in made.items()}
    plan, found = values(write(tmp_path, layers, section, ("model.layers.0.mlp.up_proj", "lm_head")))
    for path, (_, want) in made.items():
        np.testing.assert_allclose(found[path].numpy(), want, rtol=2**-24, atol=2**-150)
    assert not plan.layer("model.layers.0.mlp.up_proj").quantized
    assert plan.kv_cache.spec.element == "float8_e4m3fn"


def test_excluded_layers_are_read_as_they_are_stored(tmp_path):
    stored, _ = layer("FP8")
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.layers.0.mlp*"]}
    plan, _ = values(write(tmp_path, {PATHS[0]: stored}, section, ("lm_head", "model.layers.0.mlp.up_proj")))
    assert plan.layer("model.layers.0.mlp.up_proj").rule.startswith("model.layers.0.mlp* (config.json")


@pytest.mark.parametrize(
    ("algo", "change", "kind", "code"),
    [
        ("FP8", {"weight_scale": torch.tensor(float("nan"))}, CheckpointError, "QP-ST-SCALE"),
        ("FP8", {"input_scale": torch.tensor(0.0)}, CheckpointError, "QP-ST-SCALE"),
        ("FP8", {"weight_scale": torch.ones(N, 2)}, CheckpointError, "QP-ST-SHAPE"),
        ("FP8", {"pre_quant_scale": torch.ones(K)}, CheckpointError, "QP-ST-EXTRA"),
        ("NVFP4", {"weight_scale_2": torch.tensor(-1.0)}, CheckpointError, "QP-ST-SCALE"),
        ("NVFP4", {"weight_scale_2": None}, CheckpointError, "QP-ST-MISSING"),
        ("MXFP8", {"weight_scale": torch.full((N, K // 32), 255, dtype=torch.uint8)}, CheckpointError, "QP-ST-SCALE"),
        ("W8A16", {"weight_scale": torch.full((N,), float("inf"))}, CheckpointError, "QP-ST-SCALE"),
    ],
)
def test_bad_tensors_are_refused(tmp_path, algo, change, kind, code):
    stored = {**layer(algo)[0], **change}
    stored = {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}
    section = {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]}
    with pytest.raises(kind) as raised:
        values(write(tmp_path, {PATHS[0]: stored}, section, ("lm_head",)))
    assert raised.value.code == code, raised.value


def test_a_contradiction_between_the_two_files_stops_the_plan(tmp_path):
    beside = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    with pytest.raises(ConfigError) as raised:
        values(write(tmp_path, {PATHS[0]: layer("FP8")[0]}, section, ("lm_head",), beside))
    assert raised.value.code == "QP-CFG-CONTRADICTION"
