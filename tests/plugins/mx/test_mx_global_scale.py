"""
The factor of all NVFP4 scales: a reciprocal in the file loses nothing on the way to canonical form and back.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_files import NV_ACTIVATION, build, numbers, same_bits, stored_layer

from quantplug.errors import ConvertError
from quantplug.spec import LinearShape
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.oracles.floats import values

SCALES = values("float8_e4m3fn")[1:127].astype(np.float32)
RECIPROCAL, FACTOR = build("nvfp4"), build("nvfp4", global_name="weight_scale_2", input_global_name="input_scale")
positive = st.floats(2.0**-118, 2.0**127, width=32)


def every_scale(stored: float, scheme=RECIPROCAL) -> Weight:
    """Return a layer with one row for each scale above 0."""
    tensors = {
        "weight_packed": torch.full((126, 8), 0x22, dtype=torch.uint8),
        "weight_scale": torch.from_numpy(np.arange(1, 127, dtype=np.uint8)[:, None].copy()).view(torch.float8_e4m3fn),
        scheme.global_name: numbers(scheme.global_name, stored),
    }
    return scheme.decode(tensors, LinearShape(126, 16), "layer")


@settings(max_examples=200, deadline=None)
@given(stored=positive)
def test_scales_are_those_of_a_division_and_the_stored_number_comes_back(stored):
    """All 126 scales over any number, subnormal results included; then the number again, to the bit."""
    weight = every_scale(stored)
    with np.errstate(under="ignore"):
        wanted = SCALES / np.float32(stored)
    assert np.array_equal(weight.scale_values()[:, 0].numpy(), wanted)
    assert same_bits(RECIPROCAL.encode(weight)["weight_global_scale"], torch.tensor([stored], dtype=torch.float32))


def test_so_it_is_for_numbers_that_meet_every_scale_halfway_between_two_subnormals():
    """Below 2^-126 a quotient can lie exactly halfway: odd multiples of large powers of two show it."""
    for odd in range(1, 16, 2):
        for power in range(115, 125):
            stored = np.float32(odd * 2.0**power)
            if not np.isfinite(stored):
                continue
            with np.errstate(under="ignore"):
                wanted = SCALES / stored
            assert np.array_equal(every_scale(float(stored)).scale_values()[:, 0].numpy(), wanted)


def test_a_reciprocal_in_float32_would_do_neither():
    """Why the canonical factor is float64: two stored numbers share one reciprocal, and products are off."""
    near_two = np.float32(2) - np.float32(2.0**-23) * np.arange(1, 5, dtype=np.float32)
    assert len(set((np.float32(1) / near_two).tolist())) < len(near_two)
    stored = np.float32(540.3)
    assert not np.array_equal(SCALES * (np.float32(1) / stored), SCALES / stored)


@settings(max_examples=100, deadline=None)
@given(stored=st.floats(2.0**-126, 2.0**118, width=32))
def test_a_factor_that_multiplies_is_kept_as_it_is(stored):
    """No copy, no rounding."""
    weight = every_scale(stored, FACTOR)
    assert weight.global_scale.dtype == torch.float32
    assert np.array_equal(weight.scale_values()[:, 0].numpy(), SCALES * np.float32(stored))
    assert same_bits(FACTOR.encode(weight)["weight_scale_2"], torch.tensor(stored, dtype=torch.float32))


@pytest.mark.parametrize("scheme", [RECIPROCAL, FACTOR])
def test_both_shapes_of_a_single_number_are_read(scheme):
    """`[]` and `[1]` hold the same; what is written has the shape that its maker gives it."""
    layer = stored_layer(scheme, 4, 32)
    plain = layer.decode().dequantize()
    number = layer.tensors[scheme.global_name]
    layer.tensors[scheme.global_name] = number.reshape(() if number.dim() else (1,))
    assert torch.equal(layer.decode().dequantize(), plain)
    assert same_bits(scheme.encode(layer.decode())[scheme.global_name], number)


def test_one_spelling_becomes_the_other():
    """From modelopt's names to compressed-tensors': codes and scales keep their bytes, values differ by roundings."""
    layer = stored_layer(FACTOR, 4, 64, stored_global=0.00032)
    weight = layer.decode()
    written = RECIPROCAL.encode(weight)
    assert written.keys() == {"weight_packed", "weight_scale", "weight_global_scale"}
    again = RECIPROCAL.decode(written, layer.shape, "layer")
    assert torch.equal(again.codes, weight.codes)
    assert written["weight_global_scale"].item() == np.float32(1 / np.float64(np.float32(0.00032)))
    found, wanted = (again.dequantize().double().numpy(), layer.values)
    # The number itself is rounded once more, and scale and value on either side: five roundings of float32.
    bound = 5 * 2.0**-24 / (1 - 5 * 2.0**-24)
    assert (np.abs(found - wanted) <= bound * np.abs(wanted)).all()


@pytest.mark.parametrize(("scheme", "name"), [(RECIPROCAL, "input_global_scale"), (FACTOR, "input_scale")])
def test_the_factor_of_the_scales_of_x_comes_along(scheme, name):
    """In the same two spellings."""
    scheme = build(
        "nvfp4", activation=NV_ACTIVATION, global_name=scheme.global_name, input_global_name=scheme.input_global_name
    )
    layer = stored_layer(scheme, 4, 32)
    layer.tensors[name] = numbers(name, 486.3)
    assert name in scheme.required_suffixes
    activation = scheme.decode_activation(layer.tensors, "layer")
    stored = float(np.float32(486.3))
    assert activation.scale is None
    assert activation.global_scale.item() == (1 / stored if name == "input_global_scale" else stored)
    assert same_bits(scheme.encode(layer.decode(), activation)[name], layer.tensors[name])
    for unknown in (None, ActivationParams()):
        with pytest.raises(ConvertError, match="unknown factor of the scales of x") as caught:
            scheme.encode(layer.decode(), unknown)
        assert caught.value.code == "QP-CONV-SPEC"
