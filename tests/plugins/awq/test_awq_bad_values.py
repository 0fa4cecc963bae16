"""
Damaged and mislabelled layers and malformed parameters: one stable code each, the element named, nothing lost.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from awq_files import build, stored_layer

from quantplug.errors import CheckpointError, ConfigError

N, K = 24, 128
ASYM, SYM = build(group_size=64), build(group_size=64, zero_point=False)
GEMV = build(group_size=64, version="gemv")


def at(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


VALUES = {
    "NaN scale": (
        ASYM, "scales", lambda t: at(t, (1, 5), float("nan")), "QP-ST-SCALE", r"scales\[1, 5\]: is nan \(1 of 48",
    ),
    "infinite scale": (
        GEMV, "scales", lambda t: at(t, (5, 1), float("-inf")), "QP-ST-SCALE", r"scales\[5, 1\]: is -inf",
    ),
    "another zero point in a symmetric file": (
        SYM, "qzeros", lambda t: at(t, (1, 2), 0x78888888), "QP-ST-ZEROS",
        r"stores 7 for group 1, row 23 \(1 of 48 differ\); expected 8 everywhere.*Correct zero_point to true",
    ),
    "zero points where there is no group": (
        GEMV, "qzeros", lambda t: at(t, (3, 1), 1), "QP-ST-PADDING",
        r"qzeros\[3\]: holds 1 for group 8; expected 0 from group 2 on",
    ),
    "scales where there is no group": (
        GEMV, "scales", lambda t: at(t, (3, 2), 0.5), "QP-ST-PADDING", r"scales\[3\]: holds 0.5 for group 2",
    ),
    "floating-point words": (ASYM, "qweight", lambda t: t.float(), "QP-ST-DTYPE", "dtype float32; expected int32"),
    "64-bit words": (ASYM, "qzeros", lambda t: t.long(), "QP-ST-DTYPE", "dtype int64; expected int32"),
    "integer scales": (ASYM, "scales", lambda t: t.int(), "QP-ST-DTYPE", "int32; expected float16 or bfloat16"),
    "transposed words": (ASYM, "qweight", lambda t: t.t(), "QP-ST-SHAPE", r"shape \[3, 128\]; expected \[128, 3\]"),
    "scales of one group": (ASYM, "scales", lambda t: t[:1], "QP-ST-SHAPE", r"shape \[1, 24\]; expected \[2, 24\]"),
    "no zero points": (SYM, "qzeros", lambda t: None, "QP-ST-MISSING", "qzeros: is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_bad_tensors_are_named_and_nothing_is_lost(name):
    """Each fault has its code and a text that says where and what; the same scheme then decodes a good layer."""
    scheme, suffix, change, code, text = VALUES[name]
    layer = stored_layer(scheme, N, K, seed=3)
    bad = {**layer.tensors, suffix: change(layer.tensors[suffix])}
    bad = {key: tensor for key, tensor in bad.items() if tensor is not None}
    before = {key: tensor.clone() for key, tensor in bad.items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.decode(bad, layer.shape, "model.layers.0.mlp.up_proj")
    assert caught.value.code == code
    assert caught.value.where.startswith(f"model.layers.0.mlp.up_proj.{suffix}")
    assert all(torch.equal(bad[key].nan_to_num(), before[key].nan_to_num()) for key in bad)
    good = scheme.decode(layer.tensors, layer.shape, "layer").dequantize(torch.float64).numpy()
    assert np.array_equal(good, layer.values().astype(np.float32))


def shapes(scheme, n: int, k: int) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in stored_layer(scheme, n, k).tensors.items()}


GPTQ = {"qweight": (16, 64), "qzeros": (2, 8), "scales": (2, 64)}
SHAPES = {
    "another group": (ASYM, shapes(build(group_size=32), 64, 128), "version 'gemm' and group_size 32"),
    "one group": (ASYM, shapes(build(group_size=-1), 64, 128), "version 'gemm' and group_size -1"),
    "a layout for GEMV": (ASYM, shapes(GEMV, 64, 128), "fit version 'gemv'"),
    "a layout for GEMM": (GEMV, shapes(ASYM, 64, 128), "version 'gemm' and group_size 64"),
    "inputs that fill no group": (
        build(group_size=48),
        shapes(ASYM, 64, 128),
        "128 is not a multiple of group_size 48",
    ),
    "GPTQ's": (ASYM, GPTQ, "those of GPTQ's layout"),
    "exllama's, repacked": (build(group_size=64, version="exllama"), GPTQ, "those of GPTQ's layout"),
    "of nothing": (ASYM, {"qweight": (128, 8), "qzeros": (2, 8), "scales": (5, 64)}, "fit no AWQ layer"),
    "one dimension": (ASYM, {**shapes(ASYM, 64, 128), "scales": (64,)}, "two dimensions"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_contradict_the_configuration_say_what_they_would_fit(name):
    """Found while planning, from headers alone."""
    scheme, stored, text = SHAPES[name]
    with pytest.raises(CheckpointError, match=text) as caught:
        scheme.shape_of(stored, "layer")
    assert caught.value.code == "QP-ST-SHAPE"


def test_a_missing_tensor_is_found_while_planning():
    stored = shapes(ASYM, 64, 128)
    del stored["scales"]
    with pytest.raises(CheckpointError, match=r"scales: is not there; .*awq 4-bit group 64 asym") as caught:
        ASYM.shape_of(stored, "layer")
    assert caught.value.code == "QP-ST-MISSING"


GOOD = {"bits": 4, "group_size": 64}
PARAMS = {
    "bits 8": ({**GOOD, "bits": 8}, "QP-CFG-REFUSED", "bits is 8, which auto-round and GPTQModel pack in two"),
    "bits 9": ({**GOOD, "bits": 9}, "QP-CFG-FIELD", "bits is the integer 9; expected 4"),
    "bits a string": ({**GOOD, "bits": "4"}, "QP-CFG-FIELD", "the string '4'"),
    "bits true": ({**GOOD, "bits": True}, "QP-CFG-FIELD", "bits is true"),
    "group missing": ({"bits": 4}, "QP-CFG-FIELD", "group_size is missing"),
    "group 0": ({**GOOD, "group_size": 0}, "QP-CFG-FIELD", "-1 .one group over all inputs."),
    "group -2": ({**GOOD, "group_size": -2}, "QP-CFG-FIELD", "the integer -2"),
    "group huge": ({**GOOD, "group_size": 10**12}, "QP-CFG-FIELD", "at most 1048576"),
    "zero_point 1": ({**GOOD, "zero_point": 1}, "QP-CFG-FIELD", "zero_point is the integer 1"),
    "version a number": ({**GOOD, "version": 2}, "QP-CFG-FIELD", "the integer 2"),
    "version gemv_fast": ({**GOOD, "version": "gemv_fast"}, "QP-CFG-REFUSED", "'gemv_fast' is not read: it stores"),
    "version llm-awq": ({**GOOD, "version": "llm-awq"}, "QP-CFG-REFUSED", "multiplied by their scales and rounded"),
    "version marlin": ({**GOOD, "version": "Marlin"}, "QP-CFG-REFUSED", "'Marlin' is not read: .*one GPU kernel"),
    "version unknown": ({**GOOD, "version": "gemx"}, "QP-CFG-UNKNOWN", "'gemx' is not a known layout"),
    "parameter unknown": ({**GOOD, "sym": True}, "QP-CFG-UNKNOWN", "sym: is no parameter of awq"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_that_make_no_scheme(name):
    params, code, text = PARAMS[name]
    with pytest.raises(ConfigError, match=text) as caught:
        build(**params)
    assert caught.value.code == code
    assert caught.value.where.startswith("test: ")
