"""
Comparisons that say where two results differ and by how much. No tolerance can be passed: bounds are derived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from quantplug_testkit.oracles.canonical import Floats

Array = np.ndarray[Any, Any]


def assert_within(actual: torch.Tensor | Array, expected: Floats, bound: Floats, what: str = "result") -> None:
    """
    Assert `|actual - expected| <= bound` for every element; NaN never is within a bound.

    Args:
        actual: what a kernel returned, any shape and float dtype.
        expected: float64 in the same shape.
        bound: float64 in the same shape, from `quantplug_testkit.bounds`.
        what: names the result in the message.

    Raises:
        AssertionError: names the worst element: coordinates, both values, error, bound, and how many elements leave it.
    """
    __tracebackhide__ = True
    found = _exact(actual)
    if found.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(found.shape)}, not {list(expected.shape)}")
    with np.errstate(invalid="ignore"):
        error = np.where(found == expected, 0.0, np.abs(found - expected))
        wrong = ~(error <= bound)
    if not wrong.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(wrong, np.where(np.isnan(error), np.inf, error / bound), 0.0)
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    raise AssertionError(
        f"{np.count_nonzero(wrong)} of {wrong.size} elements of {what} leave the bound; "
        f"the worst is {[int(axis) for axis in worst]}: actual {found[worst]:.9g}, expected {expected[worst]:.9g}, "
        f"error {error[worst]:.3g}, bound {bound[worst]:.3g}"
    )


def assert_bitwise_equal(actual: torch.Tensor | Array, expected: torch.Tensor | Array, what: str = "result") -> None:
    """
    Assert that two arrays have the same dtype, shape and bytes; -0 is not 0, and a NaN is itself.

    Raises:
        AssertionError: names the number of differing elements, the first one's coordinates, both values, and the first
            differing byte.
    """
    __tracebackhide__ = True
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what} is {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
        )
    one, other = _bytes(actual), _bytes(expected)
    if one.size == 0 or np.array_equal(one, other):
        return
    byte = int(np.flatnonzero(one.ravel() != other.ravel())[0])
    differs = (one != other).any(axis=1)
    first = int(np.flatnonzero(differs)[0])
    place = tuple(int(axis) for axis in np.unravel_index(first, tuple(actual.shape)))
    raise AssertionError(
        f"{np.count_nonzero(differs)} of {differs.size} elements of {what} differ; the first is {list(place)}: "
        f"actual {actual[place]}, expected {expected[place]}; first differing byte {byte}"
    )


def _exact(values: torch.Tensor | Array) -> Floats:
    if isinstance(values, torch.Tensor):
        return np.asarray(values.detach().to("cpu", torch.float64).numpy())
    return values.astype(np.float64)


def _bytes(values: torch.Tensor | Array) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One row of bytes per element."""
    if isinstance(values, torch.Tensor):
        flat = values.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).reshape(flat.shape[0], flat.element_size()).numpy()
    dense = np.ascontiguousarray(values).reshape(-1)
    return dense.view(np.uint8).reshape(dense.shape[0], dense.itemsize)
