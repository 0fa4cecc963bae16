"""
The scheme by itself: every code and zero point against an oracle, what is shared, and what cannot be stored.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from torchao_files import build

from quantplug.errors import ConvertError
from quantplug.spec import ElementType, LinearShape
from quantplug_testkit.oracles import int8 as oracle

WIDTHS = {1: 2, 2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def stored_layer(bits, zero=0, scale=0.37):
    """Return a layer with every code of that width in each of two rows."""
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.int8).repeat(2, 1)
    zeros = torch.tensor([[0], [zero]], dtype=torch.int8)
    scales = torch.tensor([[scale], [scale / 3]], dtype=torch.bfloat16)
    return {"_weight_qdata": codes, "_weight_scale": scales, "_weight_zero_point": zeros}


def check(scheme, stored, element):
    shape = LinearShape(*stored["_weight_qdata"].shape)
    weight = scheme.decode(stored, shape, "layer")
    assert weight.spec.element is element
    assert weight.spec == replace(scheme.weight_spec(), scale_dtype="bfloat16")
    wanted = oracle.dequantize(
        stored["_weight_qdata"].numpy(), stored["_weight_scale"].double().numpy(), stored["_weight_zero_point"].numpy(),
        1, shape.in_features,
    )  # fmt: skip
    assert np.array_equal(weight.dequantize().double().numpy(), wanted)
    again = scheme.encode(weight)
    assert again.keys() == stored.keys()
    for name, tensor in again.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name])
    return weight


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_a_symmetric_layer_is_shared_and_means_itself(bits):
    stored = stored_layer(bits)
    weight = check(build(element=f"int{bits}"), stored, ElementType(f"int{WIDTHS[bits]}"))
    assert weight.zeros is None
    assert weight.codes.data_ptr() == stored["_weight_qdata"].data_ptr()


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_meets_every_zero_point(bits):
    half = 1 << (bits - 1)
    scheme = build(element=f"int{bits}", symmetric=False)
    for zero in range(-half, half):
        check(scheme, stored_layer(bits, zero), ElementType(f"uint{WIDTHS[bits]}"))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float_means_what_ml_dtypes_says(name):
    """All bytes but those that are no finite number; codes are shared, and there are no zero points."""
    octets = np.arange(256, dtype=np.uint8)
    values = octets.view(getattr(ml_dtypes, name)).astype(np.float64)
    octets = octets[np.isfinite(values)]
    codes = torch.from_numpy(octets.copy()).view(getattr(torch, name)).view(1, -1)
    stored = {"_weight_qdata": codes, "_weight_scale": torch.tensor([[0.75]])}
    scheme = build(element=name)
    weight = scheme.decode(stored, LinearShape(1, len(octets)), "layer")
    assert weight.codes.data_ptr() == codes.data_ptr()
    assert np.array_equal(weight.dequantize().numpy()[0], values[np.isfinite(values)] * 0.75)
    again = scheme.encode(weight)
    assert again.keys() == stored.keys()
    assert torch.equal(again["_weight_qdata"].view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("params", [{}, {"symmetric": False}, {"element": "float8_e5m2"}])
def test_one_scale_may_be_stored_in_three_shapes(params, shape):
    scheme = build(strategy="tensor", **params)
    codes = torch.tensor([[1, 2, 3], [-4, 5, -6]])
    dtype = torch.float8_e5m2 if "element" in params else torch.int8
    stored = {"_weight_qdata": codes.to(dtype), "_weight_scale": torch.full(shape, 0.5)}
    zero = 0
    if "element" not in params:
        zero = 0 if scheme.symmetric else 3
        stored["_weight_zero_point"] = torch.full(shape, zero, dtype=torch.int8)
    assert scheme.shape_of({name: tuple(tensor.shape) for name, tensor in stored.items()}, "layer") == LinearShape(2, 3)
    weight = scheme.decode(stored, LinearShape(2, 3), "layer")
    values = stored["_weight_qdata"].float()
    assert torch.equal(weight.dequantize(), (values - zero) * 0.5)
    assert scheme.encode(weight)["_weight_scale"].shape == (1, 1)


def test_zero_points_of_a_symmetric_layer_are_optional_and_come_back_as_zeros():
    stored = stored_layer(8)
    del stored["_weight_zero_point"]
    scheme = build()
    assert scheme.required_suffixes == {"_weight_qdata", "_weight_scale"}
    again = scheme.encode(scheme.decode(stored, LinearShape(2, 256), "layer"))
    assert torch.equal(again["_weight_zero_point"], torch.zeros(2, 1, dtype=torch.int8))


def test_the_permission_is_what_was_spelled():
    assert build().activation_spec() is None
    spec = build(activation="uint8/token/dynamic").activation_spec()
    assert (spec.element, spec.granularity, spec.dynamic) == (ElementType.UINT8, "token", True)
    assert build().decode_activation({}, "layer") is None


def broken(scheme, bits, **changes):
    return scheme, replace(scheme.decode(stored_layer(bits), LinearShape(2, 1 << bits), "layer"), **changes)


SIX, ASYM = build(element="int6"), build(element="int6", symmetric=False)
NOT_STORABLE = {
    "another contract": (build(), broken(ASYM, 6)[1], "cannot store a weight of uint8 per channel"),
    "scales of a group": (*broken(SIX, 6, scales=torch.ones(2, 2)), r"scales \[2, 2\]"),
    "zero points of a row too few": (
        *broken(ASYM, 6, zeros=torch.zeros(1, 1, dtype=torch.uint8)), r"zero points \[1, 1\]; expected \[2, 1\]",
    ),
    "a code too large": (
        *broken(SIX, 6, codes=torch.full((2, 64), 32, dtype=torch.int8)), "the code 32; expected -32 to 31",
    ),
    "a code too small": (*broken(SIX, 6, codes=torch.full((2, 64), -33, dtype=torch.int8)), "the code -33"),
    "an unsigned code too large": (
        *broken(ASYM, 6, codes=torch.full((2, 64), 160, dtype=torch.uint8)), "the code 160; expected 96 to 159",
    ),
    "a zero point too small": (
        *broken(ASYM, 6, zeros=torch.full((2, 1), 95, dtype=torch.uint8)), "the zero point 95; expected 96 to 159",
    ),
    "act-order": (*broken(SIX, 6, g_idx=torch.zeros(64, dtype=torch.int32)), "cannot store a weight of int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_STORABLE)
def test_what_cannot_be_stored_is_refused(name):
    scheme, weight, text = NOT_STORABLE[name]
    with pytest.raises(ConvertError, match=text) as caught:
        scheme.encode(weight)
    assert caught.value.code == "QP-CONV-SPEC"


def test_the_format_is_only_read():
    assert build().recipes() == {}
    with pytest.raises(NotImplementedError, match="torchao only reads"):
        build().quantize(torch.ones(2, 2))


def test_the_plugin_imports_without_torch():
    code = (
        "import sys, quantplug_torchao.plugin as p; p.quantplug_schemes(); p.quantplug_dialects(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
