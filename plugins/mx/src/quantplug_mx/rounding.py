"""
From dense weights to codes and scales: to nearest, ties to even, each group on its own.

Weights are gone through in pieces of whole rows, so that what is held besides the result stays small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE = 1 << 20
"""Elements that are rounded at a time, as float32."""

_E4M3_EXPONENT, _E2M1_EXPONENT = 8, 2
"""Exponents of the largest numbers: 448 = 1.75 * 2^8, 6 = 1.5 * 2^2."""
_TOP_QUARTER = 1.75 / 2
"""As `frexp` gives fractions: 1.75 times a power of two."""
_E2M1_LARGEST, _E4M3_LARGEST = 6.0, 448.0
_E4M3_SMALLEST = 2.0**-9

# Halfway between neighbours. On a tie the even code is taken: the upper one at every second of them.
_HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True, slots=True)
class Rounded:
    """
    Attributes:
        codes: `[N, K]`, float8_e4m3fn, or uint8 with one e2m1 code each.
        scales: `[N, G]`, float8_e8m0fnu or float8_e4m3fn.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def round_mxfp8(dense: torch.Tensor, group: int) -> Rounded:
    """
    Round to e4m3 codes on the smallest power of two that brings a group's largest magnitude to 448 or less.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        group: inputs per scale.
    """
    rounded = _empty(dense, group, torch.float8_e4m3fn, torch.float8_e8m0fnu)
    for rows, groups in _pieces(dense, group):
        fraction, exponent = torch.frexp(_largest(groups))
        # The largest is 2 fraction * 2^(exponent - 1); beyond 1.75 * 2^8 the next power of two is needed.
        octets = _exponent_bytes(exponent - 1 - _E4M3_EXPONENT + (fraction > _TOP_QUARTER), fraction)
        _store(rounded, rows, (groups * _reciprocals(octets)).to(torch.float8_e4m3fn), octets)
    return rounded


def round_mxfp4(dense: torch.Tensor, group: int) -> Rounded:
    """
    Round to e2m1 codes on the power of two that a group's largest magnitude is nearest to, over 4.

    Nearest in the grid of e2m1 itself: what is 1.75 times a power of two or more counts as the next one. A largest
    magnitude between 6 and 7 scales then becomes 6. For arguments: `round_mxfp8`.
    """
    rounded = _empty(dense, group, torch.uint8, torch.float8_e8m0fnu)
    for rows, groups in _pieces(dense, group):
        fraction, exponent = torch.frexp(_largest(groups))
        octets = _exponent_bytes(exponent - 1 - _E2M1_EXPONENT + (fraction >= _TOP_QUARTER), fraction)
        _store(rounded, rows, _e2m1(groups * _reciprocals(octets)), octets)
    return rounded


def round_nvfp4(dense: torch.Tensor, group: int, factor: torch.Tensor) -> Rounded:
    """
    Round to e2m1 codes on e4m3 scales that bring a group's largest magnitude to 6, as nearly as they can.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        group: inputs per scale.
        factor: of all scales, as it will be stored: float32 or float64 scalar.
    """
    rounded = _empty(dense, group, torch.uint8, torch.float8_e4m3fn)
    for rows, groups in _pieces(dense, group):
        wanted = (_largest(groups).to(torch.float64) / (_E2M1_LARGEST * factor)).to(torch.float32)
        scales = wanted.clamp(_E4M3_SMALLEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
        held = (scales.to(torch.float64) * factor).to(torch.float32)
        _store(rounded, rows, _e2m1(groups / held), scales)
    return rounded


def spanning_factor(dense: torch.Tensor) -> float:
    """Return the factor with which the largest magnitude of all gets the scale 448 and the code 6; 1 for zeros."""
    if not dense.numel():
        return 1.0
    low, high = (float(value) for value in dense.aminmax())
    return max(-low, high) / (_E2M1_LARGEST * _E4M3_LARGEST) or 1.0


def _empty(dense: torch.Tensor, group: int, codes: torch.dtype, scales: torch.dtype) -> Rounded:
    n, k = dense.shape
    return Rounded(torch.empty(n, k, dtype=codes), torch.empty(n, -(-k // group), dtype=scales))


def _pieces(dense: torch.Tensor, group: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows and their values as float32 `[rows, G, group]`; a short last group is filled up with zeros."""
    n, k = dense.shape
    count = -(-k // group)
    step = max(1, _PIECE // max(1, k))
    for start in range(0, n if k else 0, step):
        piece = dense[start : start + step].to(torch.float32).contiguous()
        yield (
            slice(start, start + len(piece)),
            torch.nn.functional.pad(piece, (0, count * group - k)).unflatten(1, (count, group)),
        )


def _store(rounded: Rounded, rows: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Put one piece in its place: codes `[rows, G, group]` without what fills up, scales `[rows, G, 1]`."""
    rounded.codes[rows] = codes.flatten(1)[:, : rounded.codes.shape[1]]
    rounded.scales[rows] = scales.squeeze(-1).view(rounded.scales.dtype)


def _largest(groups: torch.Tensor) -> torch.Tensor:
    return groups.abs().amax(-1, keepdim=True)


def _exponent_bytes(exponent: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Return e8m0 bytes of exponents; groups of zeros get the smallest scale."""
    return torch.where(fraction == 0, 0, (exponent + 127).clamp(0, 254)).to(torch.uint8)


def _reciprocals(octets: torch.Tensor) -> torch.Tensor:
    """Return float32 one over each scale, exact: the reciprocal of 2^(b - 127) is that of the byte 254 - b."""
    return (254 - octets).view(torch.float8_e8m0fnu).to(torch.float32)


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest e2m1 code of each float32 value, uint8; the even one on a tie, the largest beyond it."""
    halfway = torch.tensor(_HALFWAY)
    # A value at one of these belongs above; those in the even places are to belong below, so they move up by a hair.
    halfway[0::2] = torch.nextafter(halfway[0::2], torch.tensor(torch.inf))
    codes = torch.bucketize(values.abs(), halfway, right=True, out_int32=True).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)
