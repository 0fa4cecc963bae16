"""
Damaged and mislabelled layers: one stable code each, the element named, the tensors untouched, a good layer afterwards.
"""

from __future__ import annotations

import pytest
import torch
from mx_files import NV_ACTIVATION, build, same_bits, stored_layer

from quantplug.errors import CheckpointError

N, K = 6, 96
NAN, INF = float("nan"), float("inf")


def byte_at(tensor: torch.Tensor, place: tuple[int, ...], byte: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8)[place] = byte
    return changed


def nothing(tensor: torch.Tensor) -> None:
    """Leave a tensor out."""


VALUES = {
    "NaN scale": (
        "mxfp8", "weight_scale", lambda t: byte_at(t, (2, 1), 255), "QP-ST-SCALE",
        r"layer.weight_scale\[2, 1\]: is the byte 0xFF, nan \(1 of 18 are wrong\); expected a byte from 0 \(2\^-127\)",
    ),
    "NaN scale of four-bit codes": (
        "mxfp4", "weight_scale", lambda t: torch.full_like(t, 255), "QP-ST-SCALE", r"\[0, 0\]: .* \(18 of 18",
    ),
    "NaN code": (
        "mxfp8", "weight", lambda t: byte_at(t, (5, 95), 0x7F), "QP-ST-CODE",
        r"layer.weight\[5, 95\]: is the byte 0x7F, nan \(1 of 576 are wrong\)",
    ),
    "negative NaN code": ("mxfp8", "weight", lambda t: byte_at(t, (0, 3), 0xFF), "QP-ST-CODE", "byte 0xFF"),
    "NaN block scale": ("nvfp4", "weight_scale", lambda t: byte_at(t, (1, 4), 0x7F), "QP-ST-SCALE", r"\[1, 4\]: .*nan"),
    "negative block scale": (
        "nvfp4", "weight_scale", lambda t: byte_at(t, (1, 4), 0xB8), "QP-ST-SCALE",
        r"byte 0xB8, -1.0 .*; expected a number without a sign",
    ),
    "block scale of 0 over other codes": (
        "nvfp4", "weight_scale", lambda t: byte_at(t, (3, 2), 0), "QP-ST-SCALE",
        r"\[3, 2\]: .* expected above 0, since the codes it scales are not all 0",
    ),
    "global scale of 0": (
        "nvfp4", "weight_global_scale", torch.zeros_like, "QP-ST-SCALE",
        r"layer.weight_global_scale: is 0.0 \(1 of 1 are wrong\); expected a finite number above 0",
    ),
    "NaN global scale": ("nvfp4", "weight_global_scale", lambda t: t * NAN, "QP-ST-SCALE", "is nan"),
    "negative global scale": ("nvfp4", "weight_global_scale", lambda t: -t, "QP-ST-SCALE", "is -3072.75"),
    "infinite global scale": ("nvfp4", "weight_global_scale", lambda t: t * INF, "QP-ST-SCALE", "is inf"),
    "global scale that makes scales infinite": (
        "nvfp4", "weight_global_scale", lambda t: t * 0 + 2.0**-126, "QP-ST-SCALE",
        "makes the largest scale, 448.0, as large as 3.81e.40",
    ),
    "missing global scale": (
        "nvfp4", "weight_global_scale", nothing, "QP-ST-MISSING", "layer.weight_global_scale: is not there",
    ),
    "missing scales": ("mxfp4", "weight_scale", nothing, "QP-ST-MISSING", "weight_scale: is not there"),
    "missing codes": ("mxfp8", "weight", nothing, "QP-ST-MISSING", "layer.weight: is not there"),
    "scales of another dtype": (
        "mxfp8", "weight_scale", lambda t: t.to(torch.float32), "QP-ST-DTYPE",
        "dtype float32; expected uint8 or float8_e8m0fnu",
    ),
    "scales that hold other numbers": (
        "nvfp4", "weight_scale", lambda t: t.view(torch.uint8), "QP-ST-DTYPE", "uint8; expected float8_e4m3fn",
    ),
    "codes of another dtype": (
        "mxfp8", "weight", lambda t: t.view(torch.float8_e5m2), "QP-ST-DTYPE", "float8_e5m2; expected float8_e4m3fn",
    ),
    "packed codes of another dtype": ("mxfp4", "weight_packed", lambda t: t.view(torch.int8), "QP-ST-DTYPE", "int8"),
    "global scale of another dtype": (
        "nvfp4", "weight_global_scale", lambda t: t.to(torch.bfloat16), "QP-ST-DTYPE", "bfloat16; expected float32",
    ),
    "transposed scales": (
        "mxfp8", "weight_scale", lambda t: t.t().contiguous(), "QP-ST-SHAPE",
        r"shape \[3, 6\]; expected \[6, 3\] for mxfp8 of 6 x 96.*transposed",
    ),
    "scales padded for a GPU kernel": (
        "nvfp4", "weight_scale", lambda t: torch.zeros(128, 8, dtype=t.dtype), "QP-ST-SHAPE",
        r"shape \[128, 8\]; expected \[6, 6\].*padded to multiples of 128 x 4",
    ),
    "scales padded and cut into tiles": (
        "mxfp8", "weight_scale", lambda t: torch.zeros(1, 1, 32, 4, 4, dtype=t.dtype), "QP-ST-SHAPE", "padded to",
    ),
    "flat scales": ("mxfp4", "weight_scale", torch.flatten, "QP-ST-SHAPE", r"shape \[18\].*as many elements"),
    "scales of three dimensions": (
        "mxfp8", "weight_scale", lambda t: t.unsqueeze(-1), "QP-ST-SHAPE", r"shape \[6, 3, 1\].*as many elements",
    ),
    "scales of groups of 16": (
        "mxfp4", "weight_scale", lambda t: t.repeat_interleave(2, 1), "QP-ST-SHAPE", "another group size",
    ),
    "several global scales": (
        "nvfp4", "weight_global_scale", lambda t: t.repeat(3), "QP-ST-SHAPE",
        r"shape \[3\]; expected \[1\].*one number per layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_the_format_forbids(case):
    """Refused with its code and its place; the tensors stay as they are, and a good layer decodes afterwards."""
    name, suffix, change, code, words = VALUES[case]
    layer = stored_layer(build(name), N, K)
    if name == "nvfp4":
        layer.tensors["weight_scale"] = byte_at(layer.tensors["weight_scale"], (0, 0), 126)
        layer.tensors["weight_packed"] |= 0x11
    broken = dict(layer.tensors)
    changed = change(broken.pop(suffix))
    if changed is not None:
        broken[suffix] = changed
    before = {name: tensor.clone() for name, tensor in broken.items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        layer.scheme.decode(broken, layer.shape, "layer")
    assert caught.value.code == code
    assert all(same_bits(broken[name], tensor) for name, tensor in before.items())
    assert layer.decode().dequantize().shape == (N, K)


@pytest.mark.parametrize(
    ("name", "params", "extra", "code", "words"),
    [
        (
            "mxfp8", {}, {"weight_scale_inv": (N, 3)}, "QP-ST-EXTRA",
            "weight_scale_inv: is stored beside weight, weight_scale",
        ),
        (
            "nvfp4", {}, {"weight_scale_2": ()}, "QP-ST-EXTRA",
            "weight_scale_2: is stored beside weight_global_scale, weight_packed, weight_scale",
        ),
        ("nvfp4", {"weight_name": "weight"}, {"weight_packed": (N, 48)}, "QP-ST-EXTRA", "layer.weight_packed"),
        ("nvfp4", {}, {"input_global_scale": (1,)}, "QP-ST-EXTRA", "input_global_scale: is stored beside"),
        ("mxfp4", {"scale_name": "either"}, {"weight_scale": (N, 3)}, "QP-ST-EXTRA", "its scales: are stored twice"),
    ],
)  # fmt: skip
def test_two_spellings_in_one_layer(name, params, extra, code, words):
    """They may not agree, and nobody says which one belongs to the codes: refused while planning and when decoding."""
    layer = stored_layer(build(name, **params), N, K)
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()} | extra
    tensors = layer.tensors | {suffix: torch.ones(size) for suffix, size in extra.items()}
    for attempt in (
        lambda: layer.scheme.shape_of(shapes, "layer"),
        lambda: layer.scheme.decode(tensors, layer.shape, "layer"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            attempt()
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "params", "stored", "code", "words"),
    [
        ("mxfp8", {}, {"weight": (N, K)}, "QP-ST-MISSING", "layer.weight_scale: is not there; expected every tensor"),
        ("mxfp8", {"scale_name": "either"}, {"weight": (N, K)}, "QP-ST-MISSING", "weight_scale or weight_scale_inv"),
        (
            "mxfp8", {}, {"weight": (2, N, K), "weight_scale": (2, N, 3)}, "QP-ST-SHAPE",
            r"layer.weight: shape \[2, 6, 96\]; expected two dimensions",
        ),
        (
            "mxfp4", {}, {"weight_packed": (N, 48), "weight_scale": (N, 6)}, "QP-ST-SHAPE",
            r"shape \[6, 6\]; expected \[6, 3\] for mxfp4 of 6 x 96.*another group size",
        ),
        (
            "nvfp4", {"activation": NV_ACTIVATION},
            {"weight_packed": (N, 48), "weight_scale": (N, 6), "weight_global_scale": (1,)}, "QP-ST-MISSING",
            "input_global_scale: is not there",
        ),
    ],
)  # fmt: skip
def test_shapes_that_describe_no_layer(name, params, stored, code, words):
    """Found while planning, from the headers alone."""
    with pytest.raises(CheckpointError, match=words) as caught:
        build(name, **params).shape_of(stored, "layer")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "activation", "suffix", "number"),
    [
        ("nvfp4", NV_ACTIVATION, "input_global_scale", 0.0),
        ("nvfp4", NV_ACTIVATION, "input_global_scale", NAN),
        ("nvfp4", "float8_e4m3fn/tensor/static", "input_scale", -1.0),
        ("mxfp8", "float8_e4m3fn/tensor/static", "input_scale", INF),
    ],
)
def test_a_scale_of_x_that_cannot_be(name, activation, suffix, number):
    """It would be divided by."""
    with pytest.raises(CheckpointError, match=f"layer.{suffix}: is {number}") as caught:
        build(name, activation=activation).decode_activation({suffix: torch.tensor([number])}, "layer")
    assert caught.value.code == "QP-ST-SCALE"


def test_a_block_scale_of_0_over_codes_of_0_is_a_group_of_zeros():
    """Writers whose scales underflow store that; a short last group counts its own codes only."""
    layer = stored_layer(build("nvfp4"), 2, 20)
    layer.tensors["weight_scale"] = byte_at(layer.tensors["weight_scale"], (1, 1), 0)
    layer.tensors["weight_packed"][1, 8:] = 0x80
    assert not layer.decode().dequantize()[1, 16:].any()
