"""
How far the result of a mixture of experts may be from the exact one, element by element, before a kernel is wrong.

The exact result is that of `oracles.experts`. As in `bounds`, whose notation this is, everything follows from the
format, the shapes and what the kernel declares, and nothing can be tuned. "Rounded to t or not" is what is permitted
beside float32 in some places. Rounding to nearest never decreases, so that with a number known up to d, what a kernel
has lies in

    [min(v - d, round(v - d)), max(v + d, round(v + d))],

and the farther end of that is the error: of a v that t holds exactly, it is d.

1. x. Where the router's weight r multiplies it, `r x` takes a rounding, and may be rounded to the problem's dtype or
   not. Where x is quantized, `oracles.activation` says what is right, for an x that is known up to that.

2. The first product is off by what `bounds.linear_error` derives, with the x of 1. "gate_up" to t: it may be rounded to
   t.

3. f. `name` decreases up to one point z0 and increases from there on (silu: `alpha z0 = -1.2785`, gelu -0.7518,
   gelu_tanh -0.7525, relu and relu2: 0). So over an interval of z it lies between its values at the ends, and at the
   point of the interval that is nearest to z0: no Lipschitz constant is needed. Limits do not decrease either, and
   apply to the ends; a limit is held in float32, and off by `u |limit|`. Evaluating it in float32, with `u = 2^-24`:

   - silu and gelu_tanh are `z s(t)`, for s the sigmoid and t off by `n u |t|`: n is 2 for `alpha z`, and 8 for `2
     sqrt(2/pi) (z + 0.044715 z^3)`. An exponential of t is off by `(4 + 2.35 |t|) u` of itself: 2 + 1.173 |t| units in
     the last place are what CUDA states for __expf, and no other implementation in use is as loose. `1 / (1 + e^-t)`
     then is off by `s (1 - s) (4 + 2.35 |t| + n |t|) u`, and for the addition and a division of two units in the last
     place by `5 u s`. As `(1 - s) s <= 0.25` and `(1 - s) s |t| < 0.225`, this is at most `(6.6 + 0.225 n) u`: below 8
     u for silu, 9 u for gelu_tanh. `(1 + tanh(t / 2)) / 2` has half of tanh's error, which is two units in the last
     place (4 u) or that of `(e^t - 1) / (e^t + 1)`, and is within the same.
   - gelu is `z (1 + erf(z / sqrt 2)) / 2`. The loosest erf in use is Abramowitz and Stegun 7.1.26, torch's on CPUs: `1
     - (a1 t + ... + a5 t^5) e^(-x^2)` with `t = 1 / (1 + p x)`, off by 1.5e-7 (2.6 u) as it is. t takes five roundings
     (and four more, of p x, of which the part 1 - t counts), its powers up to 25, each step of the Horner scheme two:
     at most `sum |a_i| (5 i + 10) u = 126 u`, the exponential and the subtraction 6 u, the argument 1 u. Half of 136 u
     is 68 u.
   - `relu2` takes a rounding. Multiplying by z takes one, halving none; up's offset two (of itself, and the sum); gate
     times up one. Sigmoids below `2^-126` may be flushed to zero, and so may any product: `2^-126 (|z| + 1)`.
   An approximate tanh (11 bits, `tanh.approx.f32`) leaves this bound.

4. h may be rounded to the problem's dtype or not. Where x is quantized, h is, too: by `oracles.activation`, known up to
   d. Rounding d to codes makes of a d that is no wider than a rounding nothing nearly everywhere, and a whole step
   where a boundary lies in it. With a dtype of 8 bits beside 8-bit integers, whose steps are no wider, many codes have
   two right values: such a bound shows what is structurally wrong. That nothing but a boundary is passed shows in
   float32.

5. The second product: `bounds.linear_error`, with the h of 4. "expert" to t: what the expert gives is rounded to t,
   before the router's weight multiplies it or after it: `|r| (u(t) (|o| + E) + h(t)) + h(t)`.

6. y is added up in float32, in any order. Each of the at most T terms takes one product with r (of h, of the sum, or of
   the sum and the bias apart: one more), and T - 1 additions, and one to an initial 0: `gamma(T + 2) sum |r| (|o| +
   E)`, beside `sum |r| E`. Each may be flushed below `2^-126`, r too. Storing y adds what storing adds (see
   `stored_error`). A row of which no id is an expert's is exactly 0.

Where an intermediate result may overflow, the bound is infinite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantplug_testkit.bounds import CASTS, gamma, linear_error, stored_error
from quantplug_testkit.oracles.experts import apply_function, mixture, named, operands
from quantplug_testkit.oracles.rounding import LARGEST, SIGNIFICANT_BITS, SMALLEST_SUBNORMAL, round_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.kernel import Cast
    from quantplug_testkit.oracles.canonical import Floats, Integers
    from quantplug_testkit.oracles.experts import Between, Expert, Layer

EXPERT_CASTS = (*CASTS, "gate_up", "expert")
"""What a kernel for experts may declare that it rounds."""

_ROUNDOFF = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
_LOWEST_AT = {"silu": -1.2784645427610738, "gelu": -0.7517915246935645, "gelu_tanh": -0.7524614220710162}
_EVALUATED = {"silu": 8, "gelu_tanh": 9, "gelu": 68}


def mixture_bound(
    x: Floats, weights: Floats, chosen: Integers, layer: Layer, dtype: str, casts: Sequence[Cast] = ()
) -> tuple[Floats, Floats]:
    """
    Return the exact y and the largest permitted `|actual - exact|` of each of its elements, float64 `[M, H]` both.

    Args:
        x: float64 `[M, H]`, exactly what the kernel was given; finite.
        weights: float64 `[M, T]`, the router's.
        chosen: int64 `[M, T]`, see `oracles.experts.mixture`.
        layer: the experts.
        dtype: torch name of the problem's dtype.
        casts: what the kernel declares for this problem.

    Raises:
        ValueError: a cast is none that a bound can be derived from.
    """
    exact = mixture(x, weights, chosen, layer)
    size, error = np.zeros_like(exact), np.zeros_like(exact)
    to = {cast.what: cast.dtype for cast in casts if cast.what not in CASTS}
    if not set(to) <= set(EXPERT_CASTS) or not set(to.values()) <= set(SIGNIFICANT_BITS):
        raise ValueError(f"cannot derive a bound from {casts}: gate_up and expert to a float dtype, and {CASTS}")
    for number, expert in enumerate(layer.experts):
        rows, slots = np.nonzero(chosen == number)
        if not rows.size:
            continue
        factor = weights[rows, slots][:, None]
        given, off = x[rows], np.zeros((len(rows), x.shape[1]))
        if layer.weight_on_input:
            given = given * factor
            off = rounded_error(given, _ROUNDOFF * np.abs(given) + _SMALLEST_NORMAL, dtype)
            factor = np.ones_like(factor)
        output, off = _expert_error(given, off, expert, layer, dtype, casts)
        factor = np.abs(factor)
        held = 0.0
        if "expert" in to:
            off = stored_error(output, off, to["expert"])
            held = SMALLEST_SUBNORMAL[to["expert"]] / 2
        reach = np.abs(output) + off
        np.add.at(size, rows, factor * reach)
        np.add.at(error, rows, factor * off + held + _SMALLEST_NORMAL * (reach + 2))
    error = error + gamma(chosen.shape[1] + 2, _ROUNDOFF) * size
    named_one = ((chosen >= 0) & (chosen < len(layer.experts))).any(axis=1, keepdims=True)
    return exact, np.where(named_one, stored_error(exact, error, dtype), 0.0)


def rounded_error(exact: Floats, error: Floats, dtype: str) -> Floats:
    """Return how far off numbers are that are off by `error`, and then may be rounded to a dtype or not."""
    below, above = round_to(exact - error, dtype), round_to(exact + error, dtype)
    farther: Floats = np.maximum.reduce([error, np.abs(exact - below), np.abs(above - exact)])
    return farther


def function_error(product: Floats, off: Floats, function: Between) -> Floats:
    """
    Return how far f of a first product is off, `[M, I]`, when that is off by `off`, evaluated in float32.

    Raises:
        ValueError: no rule says where the function has its lowest value.
    """
    if function.alpha <= 0:
        raise ValueError(f"no rule for {function} with alpha {function.alpha}")
    if not function.gated:
        return _named_error(product, product - off, product + off, function)
    (gate, up), (gate_off, up_off) = np.split(product, 2, axis=1), np.split(off, 2, axis=1)
    ends = [gate - gate_off, gate + gate_off, up - up_off, up + up_off]
    if function.limit is not None:
        top, slack = function.limit, _ROUNDOFF * function.limit
        gate, up = np.minimum(gate, top), np.clip(up, -top, top)
        ends = [np.minimum(ends[0], top) - slack, np.minimum(ends[1], top) + slack]
        ends += [np.clip(up - up_off, -top, top) - slack, np.clip(up + up_off, -top, top) + slack]
    value, value_off = named(gate, function), _named_error(gate, ends[0], ends[1], function)
    added = up + function.up_offset
    added_off = np.maximum(ends[3] - up, up - ends[2])
    added_off = added_off + _ROUNDOFF * (abs(function.up_offset) + np.abs(added) + added_off)
    sizes = (np.abs(value) + value_off) * (np.abs(added) + added_off)
    error: Floats = value_off * (np.abs(added) + added_off) + np.abs(value) * added_off
    error += _ROUNDOFF * sizes + _SMALLEST_NORMAL
    return error


def _expert_error(
    x: Floats, off: Floats, expert: Expert, layer: Layer, dtype: str, casts: Sequence[Cast]
) -> tuple[Floats, Floats]:
    """What an expert makes of x that is off by `off`, and how far off that is before it is stored, `[m, H]` both."""
    plain = [cast for cast in casts if cast.what in CASTS]
    quantized = layer.permission is not None
    inputs = operands(x, expert.stored13, len(expert.first), layer.permission, off)
    product, off = linear_error(inputs, expert.first, expert.b13, plain, quantized=quantized)
    for cast in casts:
        if cast.what == "gate_up":
            off = rounded_error(product, off, cast.dtype)
    h = apply_function(product, layer.function)
    off = rounded_error(h, function_error(product, off, layer.function), dtype)
    lost = ~np.isfinite(off).all(axis=1, keepdims=True)
    h, off = np.where(lost, 0.0, h), np.where(lost, 0.0, off)
    result, off = linear_error(
        operands(h, (expert.stored2,), 1, layer.permission, off), [expert.second], expert.b2, plain, quantized=quantized
    )
    return result, np.where(lost, np.inf, off)


def _named_error(z: Floats, low: Floats, high: Floats, function: Between) -> Floats:
    """How far `name(z)` is off when z lies between two ends."""
    lowest_at = _LOWEST_AT.get(function.name, 0.0) / (function.alpha if function.name == "silu" else 1.0)
    value = named(z, function)
    reached = [named(end, function) for end in (low, high, np.clip(lowest_at, low, high))]
    spread = np.maximum.reduce([np.abs(each - value) for each in reached])
    size = np.maximum(np.abs(low), np.abs(high))
    if function.name == "relu2" and (size**2 > LARGEST["float32"]).any():
        return np.where(size**2 > LARGEST["float32"], np.inf, spread)
    evaluated = _EVALUATED.get(function.name, 0) * _ROUNDOFF * size
    error: Floats = spread + evaluated + 2 * _ROUNDOFF * (np.abs(value) + spread) + _SMALLEST_NORMAL * (size + 1)
    return error
