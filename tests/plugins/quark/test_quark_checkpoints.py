"""
Checkpoints in Quark's layouts from planning to values, against a decoding in NumPy that shares nothing with ours.

The stored tensors are those of Quark's safetensors export (`QParamsLinear`, `quark/torch/utils/pack.py`): `weight`,
`weight_scale`, beside integers a `weight_zero_point`, beside stored scales of inputs an `input_zero_point`.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from quark_forms import CHANNEL, INT8, MX, PLAIN, TENSOR, TOKEN, layer, section
from safetensors.torch import save_file

import quantplug
from quantplug.errors import CheckpointError
from quantplug.policy import Policy

N, K = 96, 128
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GENERATOR = torch.Generator().manual_seed(5)
PATH = "model.layers.0.mlp.down_proj"
ONE = torch.tensor(0.21)
# The reference kernel keeps the canonical form, so that values are those of the format and of no kernel.
REFERENCE = Policy.parse({"rule": [{"pin": "reference"}]}, "test")


def octets(*shape):
    return torch.randint(0, 256, shape, generator=GENERATOR, dtype=torch.uint8)


def fp8(dtype=torch.float8_e4m3fn, first=0x7F):
    stored = octets(N, K)
    return torch.where(stored & 0x7F >= first, torch.zeros_like(stored), stored).view(dtype)


def scales(*shape):
    return torch.rand(shape, generator=GENERATOR) * 0.01 + 0.001


def wide(tensor):
    names = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}
    if tensor.dtype in names:
        return tensor.view(torch.uint8).numpy().view(names[tensor.dtype]).astype(np.float64)
    return tensor.numpy().astype(np.float64)


def made(kind):
    """Return descriptions of weight and inputs, the stored tensors, and the values in float64."""
    powers = torch.randint(110, 130, (N, K // 32), generator=GENERATOR, dtype=torch.uint8)
    times = (2.0 ** (wide(powers) - 127)).repeat(32, 1)
    match kind:
        case "fp8 tensor":
            stored = {"weight": fp8(), "weight_scale": scales()[()], "input_scale": ONE}
            return TENSOR, TENSOR, stored, wide(stored["weight"]) * float(stored["weight_scale"])
        case "fp8 channel":
            stored = {"weight": fp8(), "weight_scale": scales(N)}
            return CHANNEL, TOKEN, stored, wide(stored["weight"]) * wide(stored["weight_scale"])[:, None]
        case "fp8 e5m2":
            stored = {"weight": fp8(torch.float8_e5m2, 0x7C), "weight_scale": scales(N)}
            form = {**CHANNEL, "dtype": "fp8_e5m2"}
            return form, None, stored, wide(stored["weight"]) * wide(stored["weight_scale"])[:, None]
        case "fp8 group":
            stored = {"weight": fp8(), "weight_scale": scales(N, K // 64)}
            form = {**PLAIN, "dtype": "fp8_e4m3", "group_size": 64}
            return form, None, stored, wide(stored["weight"]) * wide(stored["weight_scale"]).repeat(64, 1)
        case "fp8 block":
            stored = {"weight": fp8(), "weight_scale": scales(N // 32, K // 64)}
            form = {**PLAIN, "dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [32, 64]}
            values = wide(stored["weight"]) * wide(stored["weight_scale"]).repeat(32, 0).repeat(64, 1)
            return form, None, stored, values
        case "mxfp8":
            stored = {"weight": fp8(), "weight_scale": powers}
            form = {**MX, "dtype": "fp8_e4m3"}
            return form, {**form, "is_dynamic": True}, stored, wide(stored["weight"]) * times
        case "mxfp4" | "mxfp4 w4a8":
            stored = {"weight": octets(N, K // 2), "weight_scale": powers}
            flat = stored["weight"].numpy()
            values = E2M1[np.stack([flat & 15, flat >> 4], -1).reshape(N, K)] * times
            if kind == "mxfp4":
                return MX, {**MX, "is_dynamic": True}, stored, values
            return MX, TENSOR, {**stored, "input_scale": ONE}, values
        case "int8 channel":
            stored = {"weight": octets(N, K).view(torch.int8), "weight_scale": scales(N)}
            stored["weight_zero_point"] = torch.zeros(N, dtype=torch.int8)
            return (
                INT8,
                {**TOKEN, "dtype": "int8"},
                stored,
                wide(stored["weight"]) * wide(stored["weight_scale"])[:, None],
            )
        case "int8 zero points":
            stored = {"weight": octets(N, K).view(torch.int8), "weight_scale": scales(N)}
            zeros = torch.randint(-128, 128, (N,), generator=GENERATOR).to(torch.int8)
            stored["weight_zero_point"] = zeros
            values = (wide(stored["weight"]) - wide(zeros)[:, None]) * wide(stored["weight_scale"])[:, None]
            return {**INT8, "symmetric": False}, None, stored, values
    stored = {"weight": octets(N, K).view(torch.int8), "weight_scale": scales()[()]}
    stored |= {"weight_zero_point": torch.tensor(0, dtype=torch.int8), "input_scale": ONE}
    stored["input_zero_point"] = torch.tensor(0, dtype=torch.int8)
    values = wide(stored["weight"]) * float(stored["weight_scale"])
    return {**INT8, "qscheme": "per_tensor"}, {**TENSOR, "dtype": "int8"}, stored, values


KINDS = (
    "fp8 tensor", "fp8 channel", "fp8 e5m2", "fp8 group", "fp8 block", "mxfp8", "mxfp4", "mxfp4 w4a8", "int8 channel",
    "int8 zero points", "int8 tensor",
)  # fmt: skip


def write(directory, layers, quantization, dense=("lm_head",)):
    tensors = {f"{path}.{name}": tensor.clone() for path, stored in layers.items() for name, tensor in stored.items()}
    tensors |= {f"{path}.weight": torch.ones(8, 16, dtype=torch.bfloat16) for path in ("model.embed_tokens", *dense)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return directory


def values(directory):
    """Return the plan, and every quantized layer's values in float32."""
    plan = quantplug.plan(directory, platform="cpu", probe=False, policy=REFERENCE)
    loaded = quantplug.load_layers(plan, directory)
    return plan, {path: module.dequantize(torch.float32) for path, module in loaded.modules.items()}, loaded


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_decodes_to_the_values_of_an_independent_reading(tmp_path, kind):
    weight, inputs, stored, want = made(kind)
    plan, found, _ = values(write(tmp_path, {PATH: stored}, section(weight, inputs)))
    # One product of two float32 numbers, rounded once: half a unit in the last place.
    np.testing.assert_allclose(found[PATH].numpy(), want, rtol=2**-24, atol=2**-150)
    assert all("slow reference kernel" in warning for warning in plan.warnings)
    assert not plan.layer("lm_head").quantized


def test_layers_are_read_by_their_own_descriptions_and_scales_of_the_cache_are_handed_over(tmp_path):
    _, _, four, want = made("mxfp4")
    _, _, eight, _ = made("fp8 tensor")
    keys = {f"model.layers.0.self_attn.{name}_proj": {**made("fp8 tensor")[2], "output_scale": ONE} for name in "kv"}
    config = section(
        MX,
        {**MX, "is_dynamic": True},
        layer_quant_config={"*_proj": layer(MX), "*.o_proj": layer(TENSOR, TENSOR)},
        exclude=["*visual*", "lm_head"],
    )
    config["layer_quant_config"] = {
        "*.k_proj": layer(TENSOR, TENSOR, TENSOR),
        "*.v_proj": layer(TENSOR, TENSOR, TENSOR),
        "*.o_proj": layer(TENSOR, TENSOR),
    }
    config["export"]["kv_cache_group"] = ["*.k_proj", "*.v_proj"]
    layers = {PATH: four, "model.layers.0.self_attn.o_proj": eight, **keys}
    plan, found, loaded = values(write(tmp_path, layers, config, ("lm_head", "model.visual.proj")))
    np.testing.assert_allclose(found[PATH].numpy(), want, rtol=2**-24, atol=2**-150)
    assert plan.layer("model.layers.0.self_attn.o_proj").scheme.startswith("fp8 e4m3fn per tensor")
    assert not plan.layer("model.visual.proj").quantized
    assert plan.kv_cache.spec.element == "float8_e4m3fn"
    assert sorted(loaded.kv_scales) == [f"model.layers.0.self_attn.{name}_proj.output_scale" for name in "kv"]


@pytest.mark.parametrize(
    ("kind", "change", "code"),
    [
        ("fp8 tensor", {"weight_scale": torch.tensor(float("nan"))}, "QP-ST-SCALE"),
        ("fp8 tensor", {"input_scale": torch.tensor(-1.0)}, "QP-ST-SCALE"),
        ("fp8 channel", {"weight_scale": scales(N - 1)}, "QP-ST-SHAPE"),
        ("mxfp4", {"weight_scale": torch.full((N, K // 32), 255, dtype=torch.uint8)}, "QP-ST-SCALE"),
        ("mxfp4", {"weight_scale": None}, "QP-ST-MISSING"),
        ("int8 channel", {"weight_zero_point": None}, "QP-ST-MISSING"),
        ("int8 channel", {"input_rotation": torch.ones(4, 4)}, "QP-ST-EXTRA"),
    ],
)
def test_bad_tensors_are_refused(tmp_path, kind, change, code):
    weight, inputs, stored, _ = made(kind)
    stored = {name: tensor for name, tensor in {**stored, **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError) as raised:
        values(write(tmp_path, {PATH: stored}, section(weight, inputs)))
    assert raised.value.code == code, raised.value
