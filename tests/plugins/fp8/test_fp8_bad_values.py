"""
Damaged and mislabelled layers: one stable code each, the element named, the tensors untouched, a good layer afterwards.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_files import ELEMENTS, finite_bytes, float8, octets, stored_layer

from quantplug.errors import CheckpointError, ConfigError
from quantplug.spec import LinearShape
from quantplug_fp8.scheme import FP8Scheme

N, K = 24, 40
_INVERSE = "weight_scale_inv"
CHANNEL: dict[str, object] = {"strategy": "channel"}
BLOCK: dict[str, object] = {"strategy": "block", "block_n": 16, "block_k": 16}
DIVIDED: dict[str, object] = {**BLOCK, "scale_name": _INVERSE, "inverse": True}
STATIC: dict[str, object] = {"strategy": "tensor", "activation": "float8_e4m3fn/tensor/static"}
NAN, INF = float("nan"), float("inf")


def at(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def byte(tensor: torch.Tensor, value: int, *places: tuple[int, int]) -> torch.Tensor:
    changed = tensor.clone()
    for place in places:
        changed.view(torch.uint8)[place] = value
    return changed


VALUES = {
    "NaN scale": (
        CHANNEL, "weight_scale", lambda t: at(t, (5, 0), NAN), "QP-ST-SCALE", r"_scale\[5, 0\]: is nan \(1 of 24",
    ),
    "infinite scale": (BLOCK, "weight_scale", lambda t: at(t, (1, 2), INF), "QP-ST-SCALE", r"_scale\[1, 2\]: is inf"),
    "negative scale": (CHANNEL, "weight_scale", lambda t: -t, "QP-ST-SCALE", r"\[0, 0\]: is -.*24 of 24.*positive"),
    "scale never loaded": (STATIC, "weight_scale", lambda t: t * 0 - 1, "QP-ST-SCALE", r"is -1.0 \(1 of 1"),
    "zero scale over codes": (
        BLOCK, "weight_scale", lambda t: at(t, (1, 0), 0), "QP-ST-SCALE", r"\[1, 0\]: is 0.0 .*are not all 0",
    ),
    "scale that underflowed": (
        CHANNEL, "weight_scale", lambda t: (t * 1e-30).half(), "QP-ST-SCALE", r"is 0.0 \(24 of 24 are wrong\)",
    ),
    "divided by 0": (DIVIDED, _INVERSE, lambda t: at(t, (1, 2), 0), "QP-ST-SCALE", r"\[1, 2\]: is 0.0 .*above 0"),
    "divided by infinity": (DIVIDED, _INVERSE, lambda t: at(t, (1, 2), INF), "QP-ST-SCALE", r"\[1, 2\]: is inf"),
    "divided by NaN": (DIVIDED, _INVERSE, lambda t: at(t, (1, 2), NAN), "QP-ST-SCALE", r"\[1, 2\]: is nan"),
    "divided by less than 0": (DIVIDED, _INVERSE, lambda t: -t, "QP-ST-SCALE", r"\[0, 0\]: is -.*6 of 6"),
    "divided by a subnormal": (
        DIVIDED, _INVERSE, lambda t: at(t, (0, 1), 1e-39), "QP-ST-SCALE", r"\[0, 1\]: is 1.00.*e-39 .*whose reciprocal",
    ),
    "divided in bfloat16": (
        DIVIDED, _INVERSE, lambda t: t.bfloat16(), "QP-ST-DTYPE", r"dtype bfloat16; expected float32",
    ),
    "NaN among powers of two": (
        BLOCK, "weight_scale", lambda t: byte(t.to(torch.float8_e8m0fnu), 255, (0, 1)), "QP-ST-SCALE",
        r"\[0, 1\]: is nan",
    ),
    "NaN code": (
        CHANNEL, "weight", lambda t: byte(t, 0x7F, (3, 7)), "QP-ST-CODE",
        r"weight\[3, 7\]: is the byte 0x7F, nan \(1 of 960 codes are not finite\)",
    ),
    "negative NaN codes": (
        CHANNEL, "weight", lambda t: byte(t, 0xFF, (23, 39), (2, 0)), "QP-ST-CODE", r"weight\[2, 0\]: .*0xFF.*2 of 960",
    ),
    "zero scale of x": (STATIC, "input_scale", lambda t: t * 0, "QP-ST-SCALE", r"input_scale\[0\]: is 0.0"),
    "negative scale of x": (STATIC, "input_scale", lambda t: -t[0], "QP-ST-SCALE", "input_scale: is -0.03125"),
    "NaN scale of x": (STATIC, "input_scale", lambda t: t * NAN, "QP-ST-SCALE", "is nan"),
    "no scale": (CHANNEL, "weight_scale", lambda t: None, "QP-ST-MISSING", "weight_scale: is not there"),
    "no scale of x": (STATIC, "input_scale", lambda t: None, "QP-ST-MISSING", "input_scale: is not there"),
    "no weight": (CHANNEL, "weight", lambda t: None, "QP-ST-MISSING", "weight: is not there"),
    "scales as bytes": (
        BLOCK, "weight_scale", lambda t: t.to(torch.uint8), "QP-ST-DTYPE", "dtype uint8; expected float32 or bfloat16",
    ),
    "scales as FP8": (CHANNEL, "weight_scale", lambda t: t.to(torch.float8_e5m2), "QP-ST-DTYPE", "float8_e5m2; exp"),
    "powers of two per row": (
        CHANNEL, "weight_scale", lambda t: t.to(torch.float8_e8m0fnu), "QP-ST-DTYPE", "float8_e8m0fnu; exp",
    ),
    "scale of x as integer": (STATIC, "input_scale", lambda t: t.int(), "QP-ST-DTYPE", "dtype int32"),
    "another element": (
        CHANNEL, "weight", lambda t: t.view(torch.float8_e4m3fnuz), "QP-ST-DTYPE",
        "dtype float8_e4m3fnuz; expected float8_e4m3fn",
    ),
    "dense weight": (CHANNEL, "weight", lambda t: t.bfloat16(), "QP-ST-DTYPE", "bfloat16; expected float8_e4m3fn"),
    "bytes": (CHANNEL, "weight", lambda t: t.view(torch.uint8), "QP-ST-DTYPE", "dtype uint8"),
    "transposed weight": (CHANNEL, "weight", lambda t: t.t(), "QP-ST-SHAPE", r"shape \[40, 24\]; expected \[24, 40\]"),
    "scales along the inputs": (CHANNEL, "weight_scale", lambda t: t.t(), "QP-ST-SHAPE", r"\[1, 24\]; .* \[24, 1\] or"),
    "transposed blocks": (BLOCK, "weight_scale", lambda t: t.t(), "QP-ST-SHAPE", r"\[3, 2\]; expected \[2, 3\] or"),
    "scale per row of x": (
        STATIC, "input_scale", lambda t: t.repeat(4), "QP-ST-SHAPE", r"shape \[4\]; expected \[1\] or \[\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_bad_tensors_are_named_and_nothing_is_lost(name):
    """Each fault has its code and a text that says where and what; the same scheme then decodes a good layer."""
    params, suffix, change, code, text = VALUES[name]
    layer = stored_layer(N, K, seed=3, **params)
    bad = {**layer.tensors, suffix: change(layer.tensors[suffix])}
    bad = {key: tensor for key, tensor in bad.items() if tensor is not None}
    before = {key: tensor.clone() for key, tensor in bad.items()}

    def read() -> None:
        layer.scheme.decode(bad, layer.shape, "model.layers.0.mlp.up_proj")
        layer.scheme.decode_activation(bad, "model.layers.0.mlp.up_proj")

    with pytest.raises(CheckpointError, match=text) as caught:
        read()
    assert caught.value.code == code
    assert caught.value.where.startswith(f"model.layers.0.mlp.up_proj.{suffix}")
    assert all(
        tensor.untyped_storage().tolist() == before[key].untyped_storage().tolist() for key, tensor in bad.items()
    )
    good = layer.scheme.decode(layer.tensors, layer.shape, "layer").dequantize().numpy()
    assert np.array_equal(good, layer.values())


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_byte_that_is_no_finite_number_is_found_and_no_other(element):
    """One at a time, at the end of a row of zeros: 2 of e4m3fn, 8 of e5m2, 0x80 of the fnuz types."""
    scheme = FP8Scheme.build({"strategy": "tensor", "element": element}, "test")
    good = set(finite_bytes(element).tolist())
    for value in range(256):
        codes = np.zeros((2, 9), np.uint8)
        codes[1, 8] = value
        tensors = {"weight": float8(codes, element), "weight_scale": torch.ones(1)}
        if value in good:
            assert np.array_equal(octets(scheme.decode(tensors, LinearShape(2, 9), "layer").codes), codes)
            continue
        with pytest.raises(CheckpointError, match=rf"weight\[1, 8\]: is the byte 0x{value:02X}, (nan|-?inf) \(1 of 18"):
            scheme.decode(tensors, LinearShape(2, 9), "layer")


@pytest.mark.parametrize("params", [CHANNEL, BLOCK, {"strategy": "group", "group_size": 16}, {"strategy": "tensor"}])
def test_a_zero_scale_over_zeros_is_no_fault(params):
    """Writers that divide a largest magnitude of 0 store 0; both zeros are zero codes."""
    layer = stored_layer(N, K, **params)
    layer.tensors["weight"].view(torch.uint8)[:, ::2] = 0x80
    layer.tensors["weight"].view(torch.uint8)[:, 1::2] = 0
    layer.tensors["weight_scale"].zero_()
    assert not layer.scheme.decode(layer.tensors, layer.shape, "layer").dequantize().any()


def test_a_zero_scale_over_a_single_code_in_a_ragged_tile_is_found():
    """The last tile is 8 x 8; its last code is the only one that is not 0."""
    layer = stored_layer(N, K, **BLOCK)
    layer.tensors["weight"].view(torch.uint8).zero_()
    layer.tensors["weight_scale"].zero_()
    layer.tensors["weight"].view(torch.uint8)[N - 1, K - 1] = 1
    with pytest.raises(CheckpointError, match=r"weight_scale\[1, 2\]: is 0.0 \(1 of 6 are wrong\)"):
        layer.scheme.decode(layer.tensors, layer.shape, "layer")


def test_subnormal_scales_are_values_like_others():
    """The smallest float32 there is."""
    layer = stored_layer(2, 4)
    layer.tensors["weight_scale"].fill_(1e-45)
    assert np.array_equal(layer.scheme.decode(layer.tensors, layer.shape, "layer").dequantize().numpy(), layer.values())


def sizes(weight: list[int], scale: list[int], **more: list[int]) -> dict[str, tuple[int, ...]]:
    return {"weight": tuple(weight), "weight_scale": tuple(scale), **{k: tuple(v) for k, v in more.items()}}


@pytest.mark.parametrize(
    ("params", "stored", "code", "text"),
    [
        (CHANNEL, sizes([576, 1536], [1]), "QP-ST-SHAPE", "fit strategy 'tensor'"),
        (CHANNEL, sizes([576, 1536], [5, 12]), "QP-ST-SHAPE", "fit strategy 'block', 128 x 128"),
        (CHANNEL, sizes([576, 1536], [576, 24]), "QP-ST-SHAPE", "fit strategy 'group' and group_size 64"),
        (CHANNEL, sizes([7, 30], [3, 4]), "QP-ST-SHAPE", "fit strategy 'block', 3 x 8"),
        (STATIC, sizes([576, 1536], [576, 1], input_scale=[1]), "QP-ST-SHAPE", "fit strategy 'channel'"),
        (STATIC, sizes([960, 576], [3], input_scale=[]), "QP-ST-SHAPE", "3 scales for one weight of 960 rows.*fused"),
        (CHANNEL, sizes([576, 1536], [1536, 1]), "QP-ST-SHAPE", "fit no FP8 layer"),
        (CHANNEL, sizes([576, 1536], [0, 1]), "QP-ST-SHAPE", "fit no FP8 layer"),
        (CHANNEL, sizes([576], [576, 1]), "QP-ST-SHAPE", r"shape \[576\]; expected two dimensions"),
        (CHANNEL, {"weight": (8, 8)}, "QP-ST-MISSING", "has no weight_scale; expected one of them"),
        (CHANNEL, {"weight_scale": (8, 1)}, "QP-ST-MISSING", "has no weight;"),
        (STATIC, sizes([8, 8], [1]), "QP-ST-MISSING", "has no input_scale"),
        ({"scale_name": "either"}, {"weight": (8, 8)}, "QP-ST-MISSING", "has no weight_scale or weight_scale_inv"),
        (
            {"scale_name": "either"}, sizes([8, 8], [8, 1], weight_scale_inv=[8, 1]), "QP-ST-EXTRA",
            "stores both weight_scale and weight_scale_inv",
        ),
    ],
)  # fmt: skip
def test_shapes_that_contradict_the_configuration_say_what_they_would_fit(params, stored, code, text):
    """Found while planning, from headers alone."""
    with pytest.raises(CheckpointError, match=text) as caught:
        FP8Scheme.build(params, "test").shape_of(stored, "model.layers.0.mlp.up_proj")
    assert caught.value.code == code
    assert caught.value.where.startswith("model.layers.0.mlp.up_proj")


PARAMS = {
    "unknown": ({"bits": 8}, "QP-CFG-UNKNOWN", "bits: is no parameter of fp8"),
    "element": ({"element": "float8_e8m0fnu"}, "QP-CFG-FIELD", "element is the string 'float8_e8m0fnu'"),
    "element null": ({"element": None}, "QP-CFG-FIELD", "element is null"),
    "strategy": ({"strategy": "token"}, "QP-CFG-FIELD", "'token'"),
    "no group size": ({"strategy": "group"}, "QP-CFG-FIELD", "group_size is missing"),
    "group 0": ({"strategy": "group", "group_size": 0}, "QP-CFG-FIELD", "the integer 0"),
    "group true": ({"strategy": "group", "group_size": True}, "QP-CFG-FIELD", "group_size is true"),
    "group text": ({"strategy": "group", "group_size": "64"}, "QP-CFG-FIELD", "the string '64'"),
    "group without groups": ({"group_size": 64}, "QP-CFG-FIELD", "group_size is given, and strategy is 'channel'"),
    "block of a group": ({"strategy": "group", "group_size": 4, "block_n": 1}, "QP-CFG-FIELD", "block_n is given"),
    "block negative": ({"strategy": "block", "block_n": -128}, "QP-CFG-FIELD", "the integer -128"),
    "block 1e9": ({"strategy": "block", "block_k": 10**9}, "QP-CFG-FIELD", "at most 1048576"),
    "scale name": ({"scale_name": "scales"}, "QP-CFG-FIELD", "the string 'scales'"),
    "activation of another kind": ({"activation": "int8/token/dynamic"}, "QP-CFG-FIELD", "'int8/token/dynamic'"),
    "static per token": ({"activation": "float8_e4m3fn/token/static"}, "QP-CFG-FIELD", "scales are one per tensor"),
    "activation malformed": ({"activation": "fp8"}, "QP-CFG-FIELD", "the string 'fp8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_bad_parameters(name):
    """Types are taken as they are written, ranges are checked, and the message says where the parameter came from."""
    params, code, text = PARAMS[name]
    with pytest.raises(ConfigError, match=text) as caught:
        FP8Scheme.build(params, "the caller")
    assert caught.value.code == code
    assert caught.value.where.startswith("the caller")
