"""
How far `y = x W^T + b` may be from the exact result, element by element, before a kernel is wrong.

The exact result is that of the dequantized operands in float64; quantization error plays no part. Where a kernel
declares that it quantizes x, the operand is the quantized x, which `oracles.activation` gives. The bound follows from
the format, the shapes and what the kernel declares. Nothing in it can be tuned.

Notation: `u(t)` is the unit roundoff of a dtype t, `2^-p` for p significant bits (float32 `2^-24`, float16 `2^-11`,
bfloat16 `2^-8`), `h(t)` half its smallest subnormal, and `gamma(n) = n u / (1 - n u)` with `u = u(float32)`, the most
that n roundings in a row can add up to (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1).

1. What each weight may be off by, `e [N, K]`, from the casts that the kernel declares (none: 0). `code` is what the
   element's code stands for, an integer or the value of a floating-point code; `zero` and `scale` are those of the
   element, `scale` with the global scale; and `mid = 2^(bits-1)`, or 0 for signed codes:

   - "scales" to t: the stored scale is known, so its rounding error `r = |round(scale) - scale|` is, too:
     `|code - zero| r`. Where there is a global scale, the kernel may round before or after it multiplies: r is the
     larger of both. With "zeros" as well the parts are scaled apart, and the zero's may use the rounded scale or not:
     `max(|code - zero|, |code - mid|) r`.
   - "zeros" to t: the value is computed as `(code - mid) * scale + round((mid - zero) * scale)`:
     `u(t) |mid - zero| (|scale| + r) + h(t)`, and nothing where `zero = mid`.
   - "weights" to t: the value is rounded, after the above: `u(t) (|value| + e) + h(t)`.

2. What each x may be off by, `d [M, K]`: 0, or where x is quantized, as far as right evaluations of its scales and
   codes lie apart. It is derived in `oracles.activation`: nearly everywhere one code, two where a boundary lies within
   the roundings of a quotient.

3. Accumulation in float32. Each element takes at most two roundings to dequantize (subtracting integers is exact), two
   more where there is a global scale (which may be stored in more bits, and multiplies), one for the product with x,
   `K - 1` to add up in whatever order, and one to add the bias: `n = K + 3`, or `K + 5`. A quantized x takes two more:
   to multiply with its scale, and to turn a sum of integers into float32. Those sums are exact: codes less zero points
   times codes less zero points, in int32. It does not matter whether scales multiply codes or sums of them. So
   `A = gamma(n) ((|x| + d) (S + e)^T + |b|)`, where `S` is the sum of the magnitudes a value is computed from:
   `|value|`, or `(|code - mid| + |mid - zero|) |scale|` when the kernel declares the cast "zeros".

4. "accumulator" to float22_e8m13: codes of 8-bit floats are multiplied by the tensor cores of Ada and Hopper GPUs, and
   sums move to float32 after 128 products at most, where scales multiply them. One step takes L products p, 16 on Ada
   and 32 on Hopper, and the sum c so far. It shifts all of them to the largest exponent of any, cuts each off below the
   13th bit behind that one's leading bit, adds up what is left exactly, and cuts the sum off below its own 13th bit.
   Sources: DeepSeek-V3 (arXiv 2412.19437), 3.5.2; SageAttention2 (arXiv 2411.10958), 3.2; MMA-Sim (arXiv 2511.10909),
   which tells the exponents; an H100 and cuBLAS 13.0, where `1 + 2^-14` is 1 within 128 inputs, and exact beyond.
   The exponent of a product is the sum of its factors', and that of a subnormal code is the smallest normal one's, at
   most `2^-6`. So with `a = max(|code|, 2^-6)` for codes of x that are not 0, else 0, and `w` likewise for those of the
   weight, no term and no sum has an exponent above that of `T = sum(a w)`. A step is off by less than
   `(L + 1) 2^-13 T`, and by as much as `2^-13 T` once more for its sum; 128 products take 128 / L steps, which is 144
   times `2^-13 T` with 16 products each, and less with more. T of all groups of 128 add up to T of all inputs,
   whatever order they come in: `R = 144 * 2^-13 T`, times the scales. Where at most one product is not 0, nothing is
   cut off: its significand has 8 bits, and `R = 0`.
   "long_accumulator" to float22_e8m13: the same, and sums do not move to float32 before all K products are in them, as
   with the "fast accumulation" of cuBLAS. Each step with a product that is not 0 is off by `(L + 2) 2^-13 T` at most,
   and there are at most `S = min(ceil(K / 16), Z)` for Z such products: `R = 18 S 2^-13 T`. Little follows from that
   for a long sum.

5. So the sum before it is stored is off by `E = (|x| + d) e^T + d |value|^T + A + R + F`. F covers results and operands
   below float32's normal range, which processors may flush to zero (x86's product of BF16 pairs does so with x and
   weights): `2^-126` per operation, and times the other operand.

6. "splits" to t: the sum over K is cut into parts of 64 inputs or more, which are rounded to t and added up in t, in
   any order. Parts without a product that is not 0 are exact: with Z such products, at most `S = min(ceil(K / 64), Z)`
   are not. Each passes S roundings at most, which is `((1 + u(t))^S - 1) (T + E) + 2 S h(t)` more, where T is the sum
   of magnitudes in 3. Little follows from that for a long sum; with the identity as x there is one product, and one
   rounding.

7. "partials" to t: the product is rounded before the bias is added: `u(t) (|y - b| + E) + h(t)` more. Storing y in its
   dtype t adds `u(t) (|y| + E) + h(t)`. Where the magnitude plus all this passes the largest finite value of t, the
   result may be infinite, and the bound is.

The oracle's own float64 product is off by at most `gamma` with `u = 2^-53`; it is added, and never shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantplug_testkit.oracles.activation import Quantized
from quantplug_testkit.oracles.linear import fused_linear
from quantplug_testkit.oracles.rounding import LARGEST, SIGNIFICANT_BITS, SMALLEST_SUBNORMAL, round_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.kernel import Cast
    from quantplug_testkit.oracles.canonical import Floats, Segment

CASTS = ("scales", "zeros", "weights", "partials", "accumulator", "long_accumulator", "splits")
"""What a kernel may declare that it rounds."""

ACCUMULATOR = "float22_e8m13"
"""What the tensor cores of Ada and Hopper GPUs add up 8-bit floats in."""

_SMALLEST_NORMAL = 2.0**-126
_SMALLEST_NORMAL_CODE = 2.0**-6
_CUTS, _CUTS_IN_STEP, _STEP = 144, 18, 16
_LAST_BIT = 2.0**-13
_SHORTEST_PART = 64


def unit_roundoff(dtype: str) -> float:
    """Return the largest relative error of one rounding to nearest, in the normal range of a dtype."""
    return 2.0 ** -SIGNIFICANT_BITS[dtype]


def gamma(roundings: int, roundoff: float) -> float:
    """Return the largest relative error that so many roundings in a row add up to."""
    return roundings * roundoff / (1 - roundings * roundoff)


def dequantize_roundings(segment: Segment) -> int:
    """Return how many roundings in float32 a value may take, see 3."""
    return 2 if segment.global_scale == 1 else 4


def weight_error(segment: Segment, casts: Sequence[Cast]) -> Floats:
    """
    Return how far each value a kernel multiplies with may be off because of its casts, `[N, K]`.

    Raises:
        ValueError: a cast is not one of `CASTS`, or one is declared twice.
    """
    to = _by_name(casts)
    scale = np.abs(segment.scale())
    residual = np.zeros_like(scale)
    codes = np.abs(segment.codes - segment.zero())
    if "scales" in to:
        stored, factor = np.abs(segment.stored_scale()), abs(segment.global_scale)
        before = np.abs(round_to(stored, to["scales"]) - stored) * factor
        residual = np.maximum(before, np.abs(round_to(scale, to["scales"]) - scale))
        if "zeros" in to:
            codes = np.maximum(codes, np.abs(segment.codes - _middle(segment)))
    error: Floats = codes * residual
    if "zeros" in to:
        offset = np.abs(_middle(segment) - segment.zero())
        held = unit_roundoff(to["zeros"]) * offset * (scale + residual) + SMALLEST_SUBNORMAL[to["zeros"]] / 2
        error = error + np.where(offset == 0, 0.0, held)
    if "weights" in to:
        magnitude = np.abs(segment.values()) + error
        error = error + unit_roundoff(to["weights"]) * magnitude + SMALLEST_SUBNORMAL[to["weights"]] / 2
    return error


def linear_bound(
    x: Floats | Sequence[Quantized],
    segments: Sequence[Segment],
    bias: Floats | None,
    dtype: str,
    casts: Sequence[Cast] = (),
) -> Floats:
    """
    Return the largest permitted `|actual - exact|` of each element of y, float64 `[M, N]`.

    Args:
        x: float64 `[M, K]`, exactly what the kernel was given; finite. Where the kernel quantizes it, what it becomes
            for each segment.
        segments: the canonical weights, one below the other.
        bias: float64 `[N]`, exactly what the kernel was given, or None.
        dtype: torch name of y's dtype.
        casts: what the kernel declares for this problem.
    """
    quantized = not isinstance(x, np.ndarray)
    inputs = [Quantized.exactly(x)] * len(segments) if isinstance(x, np.ndarray) else x
    return stored_error(*linear_error(inputs, segments, bias, casts, quantized=quantized), dtype)


def linear_error(
    inputs: Sequence[Quantized],
    segments: Sequence[Segment],
    bias: Floats | None,
    casts: Sequence[Cast] = (),
    *,
    quantized: bool,
) -> tuple[Floats, Floats]:
    """
    Return the exact y, and how far that of a kernel may be off before it is stored, float64 `[M, N]` both.

    Args:
        inputs: the x of each segment, and how far a kernel's may be from it for whatever reason.
        segments: as for `linear_bound`, and so are `bias` and `casts`.
        bias: see there.
        casts: see there.
        quantized: whether the kernel quantizes x, which takes two roundings more.
    """
    to = _by_name(casts)
    values = [segment.values() for segment in segments]
    off = [weight_error(segment, casts) for segment in segments]
    summed = [_magnitude(segment, apart="zeros" in to) for segment in segments]
    size = [np.abs(each.values) + each.error for each in inputs]
    added = 0.0 if bias is None else np.abs(bias)

    roundings = values[0].shape[1] + 1 + max(dequantize_roundings(segment) for segment in segments)
    roundings += 2 if quantized else 0
    total = fused_linear(size, [s + e for s, e in zip(summed, off, strict=True)]) + added
    accumulated = (gamma(roundings, unit_roundoff("float32")) + gamma(roundings, 2.0**-53)) * total
    summands = [
        np.broadcast_to(s.sum(axis=1, keepdims=True), (len(s), len(v))) for s, v in zip(size, values, strict=True)
    ]
    multiplied = np.concatenate([np.abs(each).sum(axis=1) for each in values])
    flushed = _SMALLEST_NORMAL * (np.concatenate(summands, axis=1) + multiplied + roundings)
    error = accumulated + flushed
    if any(each.any() for each in off):
        error += fused_linear(size, off)
    if any(each.error.any() for each in inputs):
        error += fused_linear([each.error for each in inputs], [np.abs(each) for each in values])
    if "accumulator" in to:
        error += _cut_off(inputs, segments, _CUTS)
    if "long_accumulator" in to:
        steps = -(-int(values[0].shape[1]) // _STEP)
        error += _cut_off(inputs, segments, _CUTS_IN_STEP * np.minimum(_products(inputs, segments), steps))
    if "splits" in to:
        error += _added_up(total + error, np.minimum(_products(inputs, segments), _parts(values)), to["splits"])

    product = fused_linear([each.values for each in inputs], values)
    if "partials" in to:
        error = stored_error(product, error, to["partials"])
    return product if bias is None else product + bias, error


def stored_error(exact: Floats, error: Floats, dtype: str) -> Floats:
    """Return how far off numbers are once they are stored in a dtype, of numbers that are off by `error` before."""
    magnitude = np.abs(exact)
    total = error + unit_roundoff(dtype) * (magnitude + error) + SMALLEST_SUBNORMAL[dtype] / 2
    return np.where(magnitude + total > LARGEST[dtype], np.inf, total)


def _magnitude(segment: Segment, *, apart: bool) -> Floats:
    """The sum of magnitudes that each value is computed from, `[N, K]`."""
    if not apart:
        return np.abs(segment.values())
    middle = _middle(segment)
    parts = np.abs(segment.codes - middle) + np.abs(middle - segment.zero())
    return parts * np.abs(segment.scale())


def _middle(segment: Segment) -> int:
    return 0 if segment.signed else 1 << (segment.bits - 1)


def _cut_off(inputs: Sequence[Quantized], segments: Sequence[Segment], cuts: Floats | int) -> Floats:
    """How much of sums of 8-bit floats is cut off, `[M, N]`, when they are so often, see 4."""
    x = [_aligned(np.abs(each.values) + each.error, each.scale) for each in inputs]
    w = [_aligned(np.abs(segment.values()), np.abs(segment.scale())) for segment in segments]
    return np.where(_products(inputs, segments) > 1, cuts * _LAST_BIT * fused_linear(x, w), 0.0)


def _products(inputs: Sequence[Quantized], segments: Sequence[Segment]) -> Floats:
    """How many products may not be 0, `[M, N]`."""
    x = [(np.abs(each.values) + each.error > 0).astype(np.float64) for each in inputs]
    return fused_linear(x, [(segment.values() != 0).astype(np.float64) for segment in segments])


def _parts(values: Sequence[Floats]) -> int:
    """How many parts a sum may be cut into."""
    return -(-int(values[0].shape[1]) // _SHORTEST_PART)


def _added_up(magnitude: Floats, parts: Floats, dtype: str) -> Floats:
    """How far off sums are whose parts are rounded and added up in a dtype, `[M, N]`, see 6."""
    more: Floats = ((1 + unit_roundoff(dtype)) ** parts - 1) * magnitude + parts * SMALLEST_SUBNORMAL[dtype]
    return more


def _aligned(magnitude: Floats, scale: Floats) -> Floats:
    """The magnitude that a number is aligned by, subnormal codes as if they were the smallest normal one."""
    return np.where(magnitude > 0, np.maximum(magnitude, _SMALLEST_NORMAL_CODE * scale), 0.0)


def _by_name(casts: Sequence[Cast]) -> dict[str, str]:
    to: dict[str, str] = {}
    for cast in casts:
        dtypes = (ACCUMULATOR,) if cast.what.endswith("accumulator") else SIGNIFICANT_BITS
        if cast.what not in CASTS or cast.dtype not in dtypes or cast.what in to:
            raise ValueError(
                f"cannot derive a bound from {cast}: one cast each of {', '.join(CASTS)} to a float dtype, "
                f"and an accumulator to {ACCUMULATOR}"
            )
        to[cast.what] = cast.dtype
    return to
