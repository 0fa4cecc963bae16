"""
Damaged and mislabelled layers and malformed parameters: one stable code each, the element named, nothing lost.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from int8_files import build, stored_layer

from quantplug.errors import CheckpointError, ConfigError

N, K = 24, 64
BYTE, FOUR = build(), build(bits=4, strategy="group", group_size=32)
ASYM, ASYM_FOUR = build(symmetric=False), build(bits=4, symmetric=False)
TENSOR, STATIC = build(strategy="tensor"), build(activation="uint8/tensor/static")
FOUR_X, SIGNED_X = build(activation="uint4/tensor/static"), build(activation="int8/tensor/static")


def at(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def one(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


VALUES = {
    "NaN scale": (
        BYTE, "weight_scale", lambda t: at(t, (5, 0), float("nan")), "QP-ST-SCALE",
        r"weight_scale\[5, 0\]: is nan \(1 of 24",
    ),
    "infinite scale": (
        FOUR, "weight_scale", lambda t: at(t, (0, 1), float("-inf")), "QP-ST-SCALE", r"weight_scale\[0, 1\]: is -inf",
    ),
    "infinite scale of all": (
        TENSOR, "weight_scale", lambda t: t.fill_(float("inf")).view(()), "QP-ST-SCALE", r"weight_scale: is inf",
    ),
    "code beyond four bits": (
        FOUR, "weight", lambda t: at(t, (3, 9), 8), "QP-ST-PADDING",
        r"weight\[3, 9\]: is 8 \(1 of 1536 are wrong\); expected -8 to 7, for 4 bits",
    ),
    "code below four bits": (FOUR, "weight", lambda t: at(t, (3, 9), -9), "QP-ST-PADDING", r"weight\[3, 9\]: is -9"),
    "unsigned codes in an asymmetric file of four bits": (
        ASYM_FOUR, "weight", lambda t: at(t, (0, 0), 15), "QP-ST-PADDING", r"weight\[0, 0\]: is 15",
    ),
    "zero point beyond four bits": (
        ASYM_FOUR, "weight_zero_point", lambda t: at(t, (7, 0), 9), "QP-ST-ZEROS",
        r"weight_zero_point\[7, 0\]: is 9 .*-8 to 7",
    ),
    "floating-point codes": (BYTE, "weight", lambda t: t.float(), "QP-ST-DTYPE", "dtype float32; expected int8"),
    "unsigned codes": (BYTE, "weight", lambda t: t.view(torch.uint8), "QP-ST-DTYPE", "dtype uint8; expected int8"),
    "integer scales": (BYTE, "weight_scale", lambda t: t.int(), "QP-ST-DTYPE", "int32; expected bfloat16 or float16"),
    "unsigned zero points": (
        ASYM, "weight_zero_point", lambda t: t.view(torch.uint8), "QP-ST-DTYPE", "dtype uint8; expected int8",
    ),
    "transposed codes": (BYTE, "weight", lambda t: t.t(), "QP-ST-SHAPE", r"shape \[64, 24\]; expected \[24, 64\]"),
    "scales of all rows as one": (
        BYTE, "weight_scale", lambda t: t[:1], "QP-ST-SHAPE", r"shape \[1, 1\]; expected \[24, 1\]",
    ),
    "zero points of a row too few": (
        ASYM, "weight_zero_point", lambda t: t[:-1], "QP-ST-SHAPE", r"shape \[23, 1\]; expected \[24, 1\]",
    ),
    "no scales": (BYTE, "weight_scale", lambda t: None, "QP-ST-MISSING", "weight_scale: is not there"),
    "no codes": (BYTE, "weight", lambda t: None, "QP-ST-MISSING", "weight: is not there"),
    "no zero points": (ASYM, "weight_zero_point", lambda t: None, "QP-ST-MISSING", "zero_point: is not there"),
    "no scale of x": (STATIC, "input_scale", lambda t: None, "QP-ST-MISSING", "input_scale: is not there"),
    "a scale of x per channel": (
        STATIC, "input_scale", lambda t: torch.ones(64), "QP-ST-SHAPE", r"shape \[64\]; expected \[1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_bad_tensors_are_named_and_nothing_is_lost(name):
    """Each fault has its code and a text that says where and what; the same scheme then decodes a good layer."""
    scheme, suffix, change, code, text = VALUES[name]
    layer = stored_layer(scheme, N, K, seed=3)
    bad = {**layer.tensors, suffix: change(layer.tensors[suffix].clone())}
    bad = {key: tensor for key, tensor in bad.items() if tensor is not None}
    before = {key: tensor.clone() for key, tensor in bad.items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.decode(bad, layer.shape, "model.layers.0.mlp.up_proj")
    assert caught.value.code == code
    assert caught.value.where.startswith(f"model.layers.0.mlp.up_proj.{suffix}")
    assert all(torch.equal(bad[key].nan_to_num(), before[key].nan_to_num()) for key in bad)
    good = scheme.decode(layer.tensors, layer.shape, "layer").dequantize(torch.float64).numpy()
    assert np.array_equal(good, layer.values().astype(np.float32))


ABOUT_X = {
    "NaN": (STATIC, "input_scale", one(float("nan"), torch.bfloat16), "QP-ST-SCALE", r"input_scale\[0\]: is nan"),
    "zero": (STATIC, "input_scale", one(0, torch.bfloat16), "QP-ST-SCALE", "is 0.0 .*a finite number above 0"),
    "negative": (SIGNED_X, "input_scale", one(-1, torch.float32), "QP-ST-SCALE", "is -1.0 "),
    "infinite": (SIGNED_X, "input_scale", one(float("inf"), torch.float32), "QP-ST-SCALE", "is inf"),
    "zero point of four bits": (FOUR_X, "input_zero_point", one(8, torch.int8), "QP-ST-ZEROS", "is 8 .*-8 to 7"),
    "unsigned zero point of four bits": (
        FOUR_X, "input_zero_point", one(16, torch.uint8), "QP-ST-ZEROS", "is 16; expected 0 to 15",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ABOUT_X)
def test_bad_numbers_about_x_are_named(name):
    scheme, suffix, value, code, text = ABOUT_X[name]
    tensors = {**stored_layer(scheme, N, K).tensors, suffix: value}
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.decode_activation(tensors, "layer")
    assert (caught.value.code, caught.value.where.partition("[")[0]) == (code, f"layer.{suffix}")


SHAPES = {
    "per tensor": (BYTE, {"weight_scale": (1,)}, "fits strategy 'tensor'"),
    "per channel": (TENSOR, {"weight_scale": (24, 1)}, "fits strategy 'channel'"),
    "per group": (BYTE, {"weight_scale": (24, 2)}, "fits strategy 'group' with group_size 32"),
    "groups of another size": (FOUR, {"weight_scale": (24, 4)}, "fits strategy 'group' with group_size 16"),
    "nothing": (BYTE, {"weight_scale": (3, 3)}, "fits no strategy"),
    "one dimension": (BYTE, {"weight": (1536,)}, r"two dimensions, \[N, K\]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_contradict_the_configuration_say_what_they_would_fit(name):
    """Found while planning, from headers alone."""
    scheme, changes, text = SHAPES[name]
    stored = {suffix: tuple(tensor.shape) for suffix, tensor in stored_layer(scheme, N, K).tensors.items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.shape_of({**stored, **changes}, "layer")
    assert caught.value.code == "QP-ST-SHAPE"


def test_a_missing_tensor_is_found_while_planning():
    with pytest.raises(CheckpointError, match=r"weight_scale: is not there; .*int8 per channel sym") as caught:
        BYTE.shape_of({"weight": (4, 8)}, "layer")
    assert caught.value.code == "QP-ST-MISSING"


PARAMS = {
    "bits 5": ({"bits": 5}, "QP-CFG-FIELD", "one of 8, 4"),
    "bits a string": ({"bits": "8"}, "QP-CFG-FIELD", "the string '8'"),
    "bits true": ({"bits": True}, "QP-CFG-FIELD", "bits is true"),
    "bits null": ({"bits": None}, "QP-CFG-FIELD", "bits is null"),
    "strategy unknown": ({"strategy": "token"}, "QP-CFG-FIELD", "'channel', 'tensor', 'group', 'block'"),
    "group without a size": ({"strategy": "group"}, "QP-CFG-FIELD", "group_size is missing"),
    "group of none": ({"strategy": "group", "group_size": 0}, "QP-CFG-FIELD", "at least 1"),
    "group of minus one": ({"strategy": "group", "group_size": -1}, "QP-CFG-FIELD", "at least 1"),
    "group huge": ({"strategy": "group", "group_size": 10**9}, "QP-CFG-FIELD", "at most 1048576"),
    "size of no group": ({"group_size": 64}, "QP-CFG-FIELD", "given for strategy 'channel'; expected strategy 'group'"),
    "block of no block": ({"strategy": "tensor", "block_k": 64}, "QP-CFG-FIELD", "expected strategy 'block'"),
    "block of none": ({"strategy": "block", "block_n": 0}, "QP-CFG-FIELD", "at least 1"),
    "asymmetric blocks": ({"strategy": "block", "symmetric": False}, "QP-CFG-FIELD", "blocks have no zeros"),
    "symmetric 1": ({"symmetric": 1}, "QP-CFG-FIELD", "symmetric is the integer 1"),
    "scales elsewhere": ({"scale_name": "scales"}, "QP-CFG-FIELD", "'weight_scale', 'weight_scale_inv'"),
    "activation unknown": ({"activation": "int8"}, "QP-CFG-FIELD", "int8/token/dynamic"),
    "activation of two bits": ({"activation": "int2/token/dynamic"}, "QP-CFG-FIELD", "float8_e4m3fn"),
    "activation of four-bit floats": ({"activation": "float4_e2m1fn/token/dynamic"}, "QP-CFG-FIELD", "one of "),
    "rounded activation scales": (
        {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}, "QP-CFG-FIELD", "scales that are not rounded",
    ),
    "stored scales of tokens": ({"activation": "int8/token/static"}, "QP-CFG-FIELD", "one input_scale per layer"),
    "parameter unknown": ({"actorder": "group"}, "QP-CFG-UNKNOWN", "actorder: is no parameter of int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_that_make_no_scheme(name):
    params, code, text = PARAMS[name]
    with pytest.raises(ConfigError, match=text) as caught:
        build(**params)
    assert caught.value.code == code
    assert caught.value.where.startswith("test: ")
