"""
Codes, exhausted: what each stands for, against ml_dtypes, and the way from one spelling of 8-bit floats to the other.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from quantplug.codes import FLOAT4_E2M1FN_VALUES, code_values, to_fnuz
from quantplug.spec import ElementType

FLOAT8 = [element for element in ElementType if element.value.startswith("float8")]
FNUZ = {
    torch.float8_e4m3fn: (torch.float8_e4m3fnuz, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2: (torch.float8_e5m2fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz),
}
OCTETS = torch.arange(256, dtype=torch.uint8)
SCALES = [torch.float32, torch.bfloat16, torch.float16]


def same(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Whether two float32 arrays have the same numbers, signs of zeros and NaN."""
    left = ours.numpy()
    numbers = ~np.isnan(theirs)
    return np.array_equal(left, theirs, equal_nan=True) and np.array_equal(
        np.signbit(left)[numbers], np.signbit(theirs)[numbers]
    )


@pytest.mark.parametrize("element", FLOAT8)
def test_every_byte_of_every_8_bit_float(element: ElementType) -> None:
    theirs = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, element.value)).astype(np.float32)
    assert same(code_values(OCTETS.view(getattr(torch, element.value)), element), theirs)


def test_every_code_of_the_4_bit_float_in_any_shape() -> None:
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert tuple(theirs.tolist()) == FLOAT4_E2M1FN_VALUES
    codes = torch.arange(16, dtype=torch.uint8)
    assert same(code_values(codes, ElementType.FLOAT4_E2M1FN), theirs)
    turned = code_values(codes.view(2, 8).t(), ElementType.FLOAT4_E2M1FN)
    assert same(turned, theirs.reshape(2, 8).T)


@pytest.mark.parametrize("element", [ElementType.INT8, ElementType.UINT4, ElementType.FLOAT8_E4M3FN])
def test_values_are_fresh_so_that_zero_points_may_be_taken_away_in_place(element: ElementType) -> None:
    codes = torch.tensor([1, 2, 3], dtype=torch.int8 if element.signed else torch.uint8)
    codes = codes.to(torch.float8_e4m3fn) if element.floating else codes
    values = code_values(codes, element)
    values += 1
    assert values.tolist() == [2.0, 3.0, 4.0]
    assert codes.float().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", FNUZ)
def test_every_finite_byte_keeps_its_value_under_a_doubled_scale(dtype: torch.dtype) -> None:
    target, from_type, to_type = FNUZ[dtype]
    codes = OCTETS.view(dtype)
    finite = codes.float().isfinite()
    assert int(finite.sum()) == (254 if dtype == torch.float8_e4m3fn else 248)
    kept = OCTETS[finite]
    scales = torch.full((len(kept),), 0.375)
    moved, doubled = to_fnuz(kept.view(dtype), scales)
    assert moved.dtype == target
    assert torch.equal(doubled, scales * 2)
    octets = moved.view(torch.uint8)
    assert torch.equal(octets, torch.where(kept == 0x80, 0, kept))
    before = kept.numpy().view(from_type).astype(np.float64) * 0.375
    after = octets.numpy().view(to_type).astype(np.float64) * 0.75
    assert np.array_equal(before, after)
    assert torch.equal(kept.view(dtype).float() * 0.375, moved.float() * 0.75)


@pytest.mark.parametrize("dtype", FNUZ)
def test_negative_zero_becomes_zero_and_not_the_nan_that_its_byte_would_be(dtype: torch.dtype) -> None:
    codes = torch.tensor([0x80, 0x00], dtype=torch.uint8).view(dtype)
    moved, _ = to_fnuz(codes, torch.ones(1))
    assert moved.view(torch.uint8).tolist() == [0, 0]
    assert bool(torch.tensor([0x80], dtype=torch.uint8).view(FNUZ[dtype][0]).float().isnan().all())


@pytest.mark.parametrize("dtype", FNUZ)
def test_each_byte_that_is_no_finite_number_is_refused_and_the_tensor_left_alone(dtype: torch.dtype) -> None:
    for octet in OCTETS[~OCTETS.view(dtype).float().isfinite()].tolist():
        codes = torch.tensor([[1, octet]], dtype=torch.uint8)
        with pytest.raises(ValueError, match="no counterpart"):
            to_fnuz(codes.view(dtype), torch.ones(1))
        assert codes.tolist() == [[1, octet]]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.uint8, torch.float32])
def test_codes_of_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"codes are {dtype}, not one of torch\.float8_e4m3fn"):
        to_fnuz(torch.zeros(2, 2).to(dtype), torch.ones(1))


@pytest.mark.parametrize("dtype", SCALES)
def test_scales_keep_their_dtype_and_shape_and_double_exactly_subnormals_included(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    scales = torch.tensor([[0.1], [1.0], [smallest], [smallest / 4]]).to(dtype)
    codes = torch.ones(4, 3).to(torch.float8_e4m3fn)
    before = scales.clone()
    moved, doubled = to_fnuz(codes, scales)
    assert (doubled.dtype, doubled.shape, moved.shape) == (dtype, scales.shape, codes.shape)
    assert torch.equal(doubled.double(), scales.double() * 2)
    assert torch.equal(scales, before)
    assert torch.equal(codes.float(), torch.ones(4, 3)), "the caller's codes were modified"
