"""The comparisons say where and by how much, and let nothing through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantplug_testkit.compare import assert_bitwise_equal, assert_within


def test_within_names_the_worst_element():
    """Coordinates, both values, error, bound and the number of violations, as a reader needs them."""
    actual = torch.tensor([[1.0, 2.5, 3.0], [4.0, 5.0, 6.75]])
    expected = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with pytest.raises(AssertionError) as caught:
        assert_within(actual, expected, np.array([[0.1, 0.25, 0.1], [0.1, 0.1, 0.5]]), "y")
    assert str(caught.value) == (
        "2 of 6 elements of y leave the bound; the worst is [0, 1]: actual 2.5, expected 2, error 0.5, bound 0.25"
    )


def test_within_accepts_an_error_that_equals_the_bound():
    """The bound itself is permitted, and so is a bound of nothing for an exact result."""
    assert_within(np.array([1.5, 2.0]), np.array([1.0, 2.0]), np.array([0.5, 0.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_within_takes_no_number_for_a_violation(value):
    """NaN compares false with everything, and still is caught; so is an infinity that nothing permits."""
    with pytest.raises(AssertionError, match=r"1 of 3 elements of result leave the bound; the worst is \[1\]"):
        assert_within(torch.tensor([0.0, value, 9.0]), np.array([0.0, 0.0, 9.0]), np.array([1.0, 1e9, 1.0]))


def test_within_finds_the_worst_where_nothing_is_permitted():
    """An error over a bound of 0 is the worst of all."""
    with pytest.raises(AssertionError, match=r"the worst is \[1\]"):
        assert_within(np.array([9.0, 1e-9]), np.array([0.0, 0.0]), np.array([1.0, 0.0]))


def test_within_refuses_another_shape():
    """A result is never broadcast into agreement."""
    with pytest.raises(AssertionError, match=r"y has shape \[1, 2\], not \[2, 2\]"):
        assert_within(torch.zeros(1, 2), np.zeros((2, 2)), np.zeros((2, 2)), "y")


def test_within_accepts_nothing_at_all():
    """No rows, no violations."""
    assert_within(torch.zeros(0, 4), np.zeros((0, 4)), np.zeros((0, 4)))


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_bitwise_names_the_first_difference(make):
    """Count, coordinates, both values and the byte."""
    with pytest.raises(AssertionError) as caught:
        assert_bitwise_equal(make([[1, 2], [300, 7]]), make([[1, 2], [44, 8]]), "codes")
    assert str(caught.value) == (
        "2 of 4 elements of codes differ; the first is [1, 0]: actual 300, expected 44; first differing byte 17"
    )


def test_bitwise_sees_the_sign_of_zero_and_takes_a_nan_for_itself():
    """Bytes are compared, not numbers."""
    nan = torch.tensor([float("nan")])
    assert_bitwise_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match="1 of 1 elements"):
        assert_bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_bitwise_looks_through_strides():
    """A transposed view equals its dense copy."""
    dense = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    assert_bitwise_equal(dense.t(), dense.t().contiguous())
    assert_bitwise_equal(torch.zeros(0, 3), torch.zeros(0, 3))


def test_bitwise_refuses_another_dtype_or_shape():
    """Equal numbers in another dtype or shape are not equal bytes."""
    with pytest.raises(AssertionError, match=r"codes is torch.int32 \[2\], not torch.int64 \[2\]"):
        assert_bitwise_equal(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), "codes")
    with pytest.raises(AssertionError, match=r"\[2\], not torch.float32 \[1, 2\]"):
        assert_bitwise_equal(torch.zeros(2), torch.zeros(1, 2))
