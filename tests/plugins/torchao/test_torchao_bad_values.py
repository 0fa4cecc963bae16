"""
Damaged and mislabelled layers and malformed parameters: one stable code each, the element named, nothing lost.
"""

from __future__ import annotations

import pytest
import torch
from torchao_files import CASES, build, tensors

from quantplug.errors import CheckpointError, ConfigError
from quantplug.spec import LinearShape

SHAPE = LinearShape(16, 64)
NAN, INFINITY = float("nan"), float("inf")
SCHEMES = {
    "int8": build(),
    "int4-group": build(element="int4", strategy="group", group_size=32),
    "int4-group-asym": build(element="int4", strategy="group", group_size=32, symmetric=False),
    "float8": build(element="float8_e4m3fn"),
}


def layer(case):
    return {name.removeprefix("layer."): tensor for name, tensor in tensors(CASES[case]).items()}


def at(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


def byte(tensor, place, value):
    changed = tensor.clone()
    changed.view(torch.uint8)[place] = value
    return changed


VALUES = {
    "NaN scale": (
        "int8", "scale", lambda t: at(t, (5, 0), NAN), "QP-ST-SCALE",
        r"_weight_scale\[5, 0\]: is nan \(1 of 16 are wrong\); expected a finite scale, 0 or above",
    ),
    "infinite scale": ("int4-group", "scale", lambda t: at(t, (0, 1), INFINITY), "QP-ST-SCALE", r"\[0, 1\]: is inf"),
    "negative scale": ("float8", "scale", lambda t: at(t, (3, 0), -1.0), "QP-ST-SCALE", r"\[3, 0\]: is -1.0"),
    "code beyond four bits": (
        "int4-group", "qdata", lambda t: at(t, (3, 9), 8), "QP-ST-PADDING",
        r"qdata\[3, 9\]: is 8 \(1 of 1024 are wrong\); expected -8 to 7, for 4 bits",
    ),
    "code below four bits": ("int4-group-asym", "qdata", lambda t: at(t, (0, 0), -9), "QP-ST-PADDING", "is -9"),
    "zero point beyond four bits": (
        "int4-group-asym", "zero_point", lambda t: at(t, (7, 1), 8), "QP-ST-ZEROS",
        r"zero_point\[7, 1\]: is 8 \(1 of 32 are wrong\); expected -8 to 7",
    ),
    "zero point of a symmetric layer": (
        "int8", "zero_point", lambda t: at(t, (2, 0), 1), "QP-ST-ZEROS",
        r"zero_point\[2, 0\]: is 1 \(1 of 16 are wrong\); expected 0: the configuration says that codes are symmetric",
    ),
    "code that is no number": (
        "float8", "qdata", lambda t: byte(t, (1, 2), 0x7F), "QP-ST-CODE", r"qdata\[1, 2\]: is nan \(1 of 1024",
    ),
    "floating-point codes": ("int8", "qdata", lambda t: t.float(), "QP-ST-DTYPE", "dtype float32; expected int8"),
    "integers for floats": ("float8", "qdata", lambda t: t.view(torch.int8), "QP-ST-DTYPE", "expected float8_e4m3fn"),
    "unsigned codes": ("int8", "qdata", lambda t: t.view(torch.uint8), "QP-ST-DTYPE", "uint8; expected int8"),
    "integer scales": ("int8", "scale", lambda t: t.int(), "QP-ST-DTYPE", "int32; expected float32 or bfloat16"),
    "floating-point zero points": (
        "int4-group-asym", "zero_point", lambda t: t.float(), "QP-ST-DTYPE", "dtype float32; expected int8",
    ),
    "transposed codes": ("int8", "qdata", lambda t: t.t(), "QP-ST-SHAPE", r"shape \[64, 16\]; expected \[16, 64\]"),
    "a row of scales too few": (
        "int8", "scale", lambda t: t[1:], "QP-ST-SHAPE", r"shape \[15, 1\]; expected \[16, 1\]",
    ),
    "no codes": ("int8", "qdata", None, "QP-ST-MISSING", "_weight_qdata: is not there"),
    "no scales": ("float8", "scale", None, "QP-ST-MISSING", "_weight_scale: is not there"),
    "no zero points": ("int4-group-asym", "zero_point", None, "QP-ST-MISSING", "_weight_zero_point: is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_bad_tensors_are_named_and_nothing_is_lost(name):
    """Each fault has its code and a text that says where and what; the same scheme then decodes the good layer."""
    case, part, change, code, text = VALUES[name]
    scheme, suffix, good = SCHEMES[case], f"_weight_{part}", layer(case)
    bad = {key: tensor.clone() for key, tensor in good.items()}
    bad[suffix] = None if change is None else change(bad[suffix])
    bad = {key: tensor for key, tensor in bad.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.decode(bad, SHAPE, "model.layers.0.mlp.up_proj")
    assert caught.value.code == code
    assert caught.value.where.startswith(f"model.layers.0.mlp.up_proj.{suffix}")
    assert torch.isfinite(scheme.decode(good, SHAPE, "layer").dequantize()).all()


def test_a_scale_of_zero_means_zero():
    good = layer("int8")
    good["_weight_scale"][3] = 0
    assert not SCHEMES["int8"].decode(good, SHAPE, "layer").dequantize()[3].any()


SIZES = {
    "groups of another size": (
        "int4-group", {"_weight_scale": (16, 1)}, "QP-ST-SHAPE",
        r"shape \[16, 1\]; expected \[16, 2\] for torchao int4 group 32 sym and codes \[16, 64\]",
    ),
    "zero points of another size": (
        "int4-group", {"_weight_zero_point": (16, 1)}, "QP-ST-SHAPE", r"_weight_zero_point: shape \[16, 1\]",
    ),
    "one dimension": ("int8", {"_weight_qdata": (1024,)}, "QP-ST-SHAPE", r"two dimensions, \[N, K\]"),
    "three dimensions": ("int8", {"_weight_qdata": (2, 16, 64)}, "QP-ST-SHAPE", r"two dimensions, \[N, K\]"),
    "zero points of floats": (
        "float8", {"_weight_zero_point": (16, 1)}, "QP-ST-EXTRA", "_weight_zero_point: is stored beside float8_e4m3fn",
    ),
    "no scales": ("int8", {"_weight_scale": None}, "QP-ST-MISSING", "is not there; .*torchao int8 per channel sym"),
    "no zero points": ("int4-group-asym", {"_weight_zero_point": None}, "QP-ST-MISSING", "is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_shapes_that_contradict_the_configuration_are_found_while_planning(name):
    case, changes, code, text = SIZES[name]
    stored = {suffix: tuple(tensor.shape) for suffix, tensor in layer(case).items()} | changes
    with pytest.raises(CheckpointError, match=text) as caught:
        SCHEMES[case].shape_of({suffix: size for suffix, size in stored.items() if size is not None}, "layer")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("params", "stored", "text"),
    [
        ({"strategy": "group", "group_size": 48}, (16, 64), "16 x 64 cannot be tiled with 1 x 48"),
        (
            {"element": "float8_e4m3fn", "strategy": "block", "block_n": 32, "block_k": 32}, (16, 64),
            "16 x 64 cannot be tiled with 32 x 32",
        ),
        (
            {"element": "float8_e4m3fn", "strategy": "block", "block_n": 16, "block_k": 48}, (16, 64),
            "16 x 64 cannot be tiled with 16 x 48",
        ),
    ],
)  # fmt: skip
def test_groups_and_blocks_that_do_not_tile_a_layer_are_refused(params, stored, text):
    scheme = build(**params)
    with pytest.raises(ConfigError, match=text) as caught:
        scheme.shape_of({"_weight_qdata": stored, "_weight_scale": (16, 2)}, "layer")
    assert caught.value.code == "QP-CFG-FIELD"


PARAMS = {
    "element unknown": ({"element": "int9"}, "QP-CFG-FIELD", "element is the string 'int9'"),
    "element unsigned": ({"element": "uint4"}, "QP-CFG-FIELD", "one of 'int1'"),
    "element a number": ({"element": 8}, "QP-CFG-FIELD", "element is the integer 8"),
    "strategy unknown": ({"strategy": "token"}, "QP-CFG-FIELD", "'channel', 'tensor', 'group', 'block'"),
    "group without a size": ({"strategy": "group"}, "QP-CFG-FIELD", "group_size is missing"),
    "group of none": ({"strategy": "group", "group_size": 0}, "QP-CFG-FIELD", "at least 1"),
    "group of truth": ({"strategy": "group", "group_size": True}, "QP-CFG-FIELD", "group_size is true"),
    "group huge": ({"strategy": "group", "group_size": 10**9}, "QP-CFG-FIELD", "at most 1048576"),
    "size of no group": ({"group_size": 32}, "QP-CFG-FIELD", "given for strategy 'channel'; expected strategy 'group'"),
    "half a block": (
        {"element": "float8_e5m2", "strategy": "block", "block_n": 128}, "QP-CFG-FIELD", "block_k is missing",
    ),
    "blocks of integers": (
        {"strategy": "block", "block_n": 128, "block_k": 128}, "QP-CFG-FIELD",
        "is 'block' for int8; expected float8_e4m3fn or float8_e5m2",
    ),
    "symmetric 1": ({"symmetric": 1}, "QP-CFG-FIELD", "symmetric is the integer 1"),
    "floats with zeros": ({"element": "float8_e5m2", "symmetric": False}, "QP-CFG-FIELD", "floats have no zeros"),
    "activation unknown": ({"activation": "int8"}, "QP-CFG-FIELD", "int8/token/dynamic"),
    "activation of four bits": ({"activation": "int4/token/dynamic"}, "QP-CFG-FIELD", "is 'int4/token/dynamic'"),
    "stored scales of x": ({"activation": "int8/tensor/static"}, "QP-CFG-FIELD", "dynamic, with scales that are not"),
    "rounded scales of x": (
        {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}, "QP-CFG-FIELD", "scales that are not rounded",
    ),
    "parameter unknown": ({"bits": 8}, "QP-CFG-UNKNOWN", "bits: is no parameter of torchao"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_that_make_no_scheme(name):
    params, code, text = PARAMS[name]
    with pytest.raises(ConfigError, match=text) as caught:
        build(**params)
    assert caught.value.code == code
    assert caught.value.where.startswith("test: ")
