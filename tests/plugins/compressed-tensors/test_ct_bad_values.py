"""
Tensors and parameters that are not what the format allows: each with its code, the element, and what to do.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ct_files import build, stored_layer

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.spec import LinearShape

PARAMETERS = {
    "an unknown one": ({"bits": 4, "sym": True}, "QP-CFG-UNKNOWN", "sym: is no parameter of ct-pack"),
    "no bits": ({}, "QP-CFG-FIELD", "bits is missing"),
    "bits a text": ({"bits": "4"}, "QP-CFG-FIELD", "the string '4'"),
    "bits true": ({"bits": True}, "QP-CFG-FIELD", "bits is true"),
    "no bits at all": ({"bits": 0}, "QP-CFG-FIELD", "the integer 0"),
    "nine bits": ({"bits": 9}, "QP-CFG-FIELD", "at most 8"),
    "five bits": ({"bits": 5}, "QP-CFG-REFUSED", "codes of 5 bits are not read.*2, 3, 4, 8"),
    "a strategy of another format": ({"bits": 4, "strategy": "block"}, "QP-CFG-FIELD", "'block'"),
    "groups without a size": ({"bits": 4, "strategy": "group"}, "QP-CFG-FIELD", "group_size is null.*'group'"),
    "rows with a size": ({"bits": 4, "strategy": "channel", "group_size": 32}, "QP-CFG-FIELD", "'channel'"),
    "a size of 0": ({"bits": 4, "group_size": 0}, "QP-CFG-FIELD", "the integer 0"),
    "a huge size": ({"bits": 4, "group_size": 1 << 40}, "QP-CFG-FIELD", "at most 1048576"),
    "an order unheard of": ({"bits": 4, "actorder": "static"}, "QP-CFG-FIELD", "'static'"),
    "an order of no groups": ({"bits": 4, "actorder": "group"}, "QP-CFG-FIELD", "there are no groups"),
    "symmetric as a number": ({"bits": 4, "symmetric": 1}, "QP-CFG-FIELD", "symmetric is the integer 1"),
    "rounded scales of x": (
        {"bits": 4, "activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}, "QP-CFG-FIELD", "activation is",
    ),
    "stored scales of tokens": ({"bits": 4, "activation": "int8/token/static"}, "QP-CFG-FIELD", "one per tensor"),
    "x in a type of weights": ({"bits": 4, "activation": "int3/token/dynamic"}, "QP-CFG-FIELD", "activation is"),
    "a grid unheard of": ({"bits": 4, "grid": "q5_0"}, "QP-CFG-FIELD", "'q5_0'"),
    "a grid of other groups": ({"bits": 4, "group_size": 64, "grid": "q4_0"}, "QP-CFG-FIELD", "group_size 32"),
    "a grid with zero points": (
        {"bits": 4, "group_size": 32, "symmetric": False, "grid": "q4_0"}, "QP-CFG-FIELD", "symmetric",
    ),
    "scales in float64": ({"bits": 4, "scale_dtype": "float64"}, "QP-CFG-FIELD", "'float64'"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_that_are_refused(name):
    params, code, words = PARAMETERS[name]
    with pytest.raises(ConfigError, match=words) as caught:
        build(**params)
    assert caught.value.code == code


def spoiled(scheme, change):
    """Return a stored layer of 10 x 40 with one tensor changed."""
    layer = stored_layer(scheme, 10, 40)
    change(layer.tensors)
    return layer


def put(name: str, index: tuple[int, ...] | int, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] = value

    return change


def to(name: str, tensor: torch.Tensor):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensor

    return change


ASYM = {"bits": 4, "group_size": 16, "symmetric": False}
ORDER = {"bits": 4, "group_size": 16, "actorder": "group"}
STATIC = {"bits": 4, "activation": "uint8/tensor/static"}
VALUES = {
    "codes missing": (ASYM, lambda t: t.pop("weight_packed"), "QP-ST-MISSING", "weight_packed: is not there"),
    "size missing": (ASYM, lambda t: t.pop("weight_shape"), "QP-ST-MISSING", "weight_shape"),
    "zeros missing": (ASYM, lambda t: t.pop("weight_zero_point"), "QP-ST-MISSING", "weight_zero_point"),
    "order missing": (ORDER, lambda t: t.pop("weight_g_idx"), "QP-ST-MISSING", "weight_g_idx"),
    "codes in int64": (ASYM, to("weight_packed", torch.zeros(10, 5, dtype=torch.int64)), "QP-ST-DTYPE", "int64.*int32"),
    "scales in float64": (ASYM, to("weight_scale", torch.ones(10, 3).double()), "QP-ST-DTYPE", "float64"),
    "zeros unpacked": (ASYM, to("weight_zero_point", torch.zeros(2, 3, dtype=torch.int8)), "QP-ST-DTYPE", "int8"),
    "a group too few": (ASYM, to("weight_scale", torch.ones(10, 2)), "QP-ST-SHAPE", r"\[10, 2\].*\[10, 3\]"),
    "another size": (ASYM, put("weight_shape", 1, 39), "QP-ST-SHAPE", r"weight_shape: says \[10, 39\].*\[10, 40\]"),
    "a scale that is no number": (
        ASYM, put("weight_scale", (3, 1), float("nan")), "QP-ST-SCALE", r"weight_scale\[3, 1\]: is nan \(1 of 30",
    ),
    "an infinite scale": (
        {"bits": 4, "strategy": "tensor"}, put("weight_scale", 0, float("inf")), "QP-ST-SCALE", r"\[0\].*inf",
    ),
    "codes behind the last": (
        {"bits": 3}, put("weight_packed", (7, 3), 1 << 26), "QP-ST-PADDING", "field 40 of row 7 holds 4",
    ),
    "zero points behind the last": (
        ASYM, put("weight_zero_point", (1, 2), 1 << 8), "QP-ST-PADDING", "weight_zero_point: field 10 of row 2 holds 1",
    ),
    "a zero point beyond four bits": (
        {"bits": 4, "strategy": "tensor", "symmetric": False}, put("weight_zero_point", 0, 8),
        "QP-ST-ZEROS", "weight_zero_point: is 8.*-8 to 7",
    ),
    "a group too high": (ORDER, put("weight_g_idx", 5, 3), "QP-ST-GIDX", r"weight_g_idx\[5\]: is 3.*0 to 2"),
    "an order partly filled in": (ORDER, put("weight_g_idx", 5, -1), "QP-ST-GIDX", r"\[5\]: is -1.*-1 in every place"),
    "a group never used": (
        ORDER, to("weight_g_idx", torch.zeros(40, dtype=torch.int32)), "QP-ST-GIDX", "leaves 2 of 3 groups.* 1;",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_refused(name):
    params, change, code, words = VALUES[name]
    layer = spoiled(build(**params), change)
    with pytest.raises(CheckpointError, match=words) as caught:
        layer.scheme.decode(layer.tensors, layer.shape, "model.layers.0.mlp.up_proj")
    assert caught.value.code == code
    assert caught.value.where.startswith("model.layers.0.mlp.up_proj.")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (put("input_scale", 0, 0.0), "QP-ST-SCALE"),
        (put("input_scale", 0, -1.0), "QP-ST-SCALE"),
        (put("input_scale", 0, float("nan")), "QP-ST-SCALE"),
        (put("input_scale", 0, float("inf")), "QP-ST-SCALE"),
    ],
)
def test_scales_of_x_that_nothing_can_be_divided_by(change, code):
    layer = spoiled(build(**STATIC), change)
    with pytest.raises(CheckpointError, match=r"input_scale: is .*finite positive") as caught:
        layer.scheme.decode_activation(layer.tensors, "layer")
    assert caught.value.code == code


def test_a_zero_point_of_x_beyond_its_width():
    scheme = build(bits=4, activation="uint4/tensor/static")
    layer = spoiled(scheme, put("input_zero_point", 0, -9))
    with pytest.raises(CheckpointError, match=r"input_zero_point: is -9.*-8 to 7") as caught:
        scheme.decode_activation(layer.tensors, "layer")
    assert caught.value.code == "QP-ST-ZEROS"


@pytest.mark.parametrize("g_idx", [torch.arange(40, dtype=torch.int32) // 16, torch.full((40,), -1, dtype=torch.int32)])
def test_a_trivial_order_is_none(g_idx):
    """Filled in or not."""
    layer = spoiled(build(**ORDER), to("weight_g_idx", g_idx))
    assert layer.scheme.decode(layer.tensors, layer.shape, "layer").g_idx is None


SHAPES = {
    "three dimensions": ({"bits": 4}, {"weight_packed": (2, 8, 5)}, r"weight_packed: shape \[2, 8, 5\].*2 dimensions"),
    "a scalar size": ({"bits": 4}, {"weight_shape": ()}, r"weight_shape: shape \[\].*1 dimension"),
    "rows that differ": ({"bits": 4}, {"weight_scale": (9, 1)}, r"weight_scale: shape \[9, 1\].*\[10, 1\]"),
    "eight bits": (
        {"bits": 4, "group_size": 16}, {"weight_packed": (10, 8), "weight_scale": (10, 2)},
        r"weight_packed: shape \[10, 8\].*fit num_bits 8 with these groups",
    ),
    "three bits with gaps": (
        {"bits": 3, "group_size": 64}, {"weight_packed": (10, 58), "weight_scale": (10, 9)}, "words of ten 3-bit codes",
    ),
    "nothing that fits": (
        {"bits": 4, "group_size": 64}, {"weight_packed": (10, 59), "weight_scale": (10, 9)}, "Check num_bits, strategy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_describe_no_layer(name):
    params, stored, words = SHAPES[name]
    stored = {"weight_packed": (10, 5), "weight_scale": (10, 1), "weight_shape": (2,), **stored}
    with pytest.raises(CheckpointError, match=words) as caught:
        build(**params).shape_of(stored, "layer")
    assert caught.value.code == "QP-ST-SHAPE"


def test_a_tensor_that_is_missing_is_named_before_any_shape():
    with pytest.raises(CheckpointError, match=r"layer.weight_shape: is not there") as caught:
        build(bits=4).shape_of({"weight_packed": (10, 5), "weight_scale": (10, 1)}, "layer")
    assert caught.value.code == "QP-ST-MISSING"


def test_weights_of_another_contract_are_not_written():
    """Another width, zero points where none belong, scales of another size, codes too wide."""
    layer = stored_layer(build(bits=4, group_size=16), 8, 32)
    weight = layer.scheme.decode(layer.tensors, LinearShape(8, 32), "layer")
    for scheme, words in (
        (build(bits=3, group_size=16), "a weight of int4 group 16"),
        (build(bits=4, group_size=16, symmetric=False), "a weight of int4 group 16"),
        (build(bits=4, group_size=32), "a weight of int4 group 16"),
    ):
        with pytest.raises(ConvertError, match=words) as caught:
            scheme.encode(weight)
        assert caught.value.code == "QP-CONV-SPEC"
    for broken, words in (
        (replace(weight, codes=weight.codes + 8), r"the code 1\d; expected -8 to 7"),
        (replace(weight, scales=weight.scales[:, :1]), r"scales \[8, 1\]"),
        (replace(weight, spec=replace(weight.spec, scale_dtype="float64")), "scales in float64"),
    ):
        with pytest.raises(ConvertError, match=words) as caught:
            layer.scheme.encode(broken)
        assert caught.value.code == "QP-CONV-SPEC"
