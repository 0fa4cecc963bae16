"""
How far the gradient that experts give x may be from the exact one, element by element, before a kernel is wrong.

Of L, the sum of one element of y of each row. With d the error of what stands before it, in the notation of `bounds`
and `expertbounds`, whose first product p and its error are taken as they are:

1. h. Its gradient is `r w`, r the router's weight and w the row of the second weight that gives the element. w is off
   by what the casts of weights allow.

2. p. With a gate, `g' = r w n'(g) (up + offset)` and `up' = r w n(g)`; else `r w n'(p)`. Slopes n' are off by `c d`,
   c the largest curvature of the function (silu: alpha / 2; gelu and gelu_tanh: 0.7979; relu2: 2), and by 1 for relu
   where p may lie on either side of 0. Evaluating them in float32 takes less than `128 u (1 + |z|)`: half of it is
   what erf is off by (`expertbounds`, 3), and all other terms are no larger than `1 + |z|` and take few roundings.

3. x. The sum over outputs of p's gradient times the first weight, and over experts.

4. Rounding. The gradients of r's product, of h (twice: where h is stored, and where f takes it up), of p, of the
   parts of the first product and their sum may be stored in the problem's dtype, and so may each partial sum over T
   experts: `gamma(7 + T, u(dtype))` of the sum of magnitudes, beside `gamma(3 I + 8, u)` in float32; each may lose
   half of the smallest number of that dtype, times what multiplies it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from quantplug_testkit.bounds import CASTS, gamma, linear_error, unit_roundoff, weight_error
from quantplug_testkit.expertbounds import function_error, rounded_error
from quantplug_testkit.oracles.experts import Function, named, operands
from quantplug_testkit.oracles.rounding import SMALLEST_SUBNORMAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.kernel import Cast
    from quantplug_testkit.oracles.canonical import Floats, Integers
    from quantplug_testkit.oracles.experts import Between, Layer

_ROUNDOFF = 2.0**-24
_ROOT, _OF_GELU = math.sqrt(2 / math.pi), 0.798


def gradient_bound(
    x: Floats, weights: Floats, chosen: Integers, picked: Integers, layer: Layer, dtype: str, casts: Sequence[Cast]
) -> tuple[Floats, Floats]:
    """
    Return the exact gradient of x and the largest permitted error of each of its elements, float64 `[M, H]` both.

    Args:
        x: float64 `[M, H]`, as it is: nothing is quantized.
        weights: float64 `[M, T]`, the router's, which multiply what experts give.
        chosen: int64 `[M, T]`, numbers of experts, or -1.
        picked: int64 `[M]`, the element of each row of y that the gradient is of.
        layer: the experts; their function has no limit.
        dtype: torch name of the problem's dtype.
        casts: what the kernel declares for this problem.
    """
    exact, size, error, lost = (np.zeros_like(x) for _ in range(4))
    plain = [cast for cast in casts if cast.what in CASTS]
    for number, expert in enumerate(layer.experts):
        rows, slots = np.nonzero(chosen == number)
        if not rows.size:
            continue
        inputs = operands(x[rows], expert.stored13, len(expert.first), None)
        product, off = linear_error(inputs, expert.first, expert.b13, plain, quantized=False)
        for cast in casts:
            if cast.what == "gate_up":
                off = rounded_error(product, off, cast.dtype)
        factor, outputs = weights[rows, slots][:, None], picked[rows]
        given = factor * expert.second.values()[outputs]
        given_off = np.abs(factor) * weight_error(expert.second, plain)[outputs]
        slope, slope_off = _slopes(product, off, layer.function)
        given, given_off = (np.tile(each, slope.shape[1] // each.shape[1]) for each in (given, given_off))
        inner = given * slope
        inner_off = given_off * (np.abs(slope) + slope_off) + np.abs(given) * slope_off
        values = np.concatenate([part.values() for part in expert.first])
        held = np.abs(values) + np.concatenate([weight_error(part, plain) for part in expert.first])
        reach = np.abs(inner) + inner_off
        np.add.at(exact, rows, inner @ values)
        np.add.at(size, rows, reach @ held)
        np.add.at(error, rows, inner_off @ np.abs(values) + reach @ (held - np.abs(values)))
        np.add.at(lost, rows, 1 + (1 + np.abs(slope) + slope_off) @ held)
    top_k, between = chosen.shape[1], layer.experts[0].second.values().shape[1]
    relative = gamma(7 + top_k, unit_roundoff(dtype)) + gamma(3 * between + 8, _ROUNDOFF)
    return exact, error + relative * (size + error) + (7 + top_k) * SMALLEST_SUBNORMAL[dtype] * lost


def _slopes(product: Floats, off: Floats, function: Between) -> tuple[Floats, Floats]:
    """Return the derivative of f by each element of a first product that is off by `off`, and how far it is off."""
    if not function.gated:
        return _slope(product, off, function)
    (gate, up), (gate_off, up_off) = np.split(product, 2, axis=1), np.split(off, 2, axis=1)
    slope, slope_off = _slope(gate, gate_off, function)
    added = up + function.up_offset
    added_off = up_off + _ROUNDOFF * (np.abs(added) + up_off)
    value_off = function_error(gate, gate_off, Function(function.name, gated=False, alpha=function.alpha))
    off_gate = slope_off * (np.abs(added) + added_off) + np.abs(slope) * added_off
    return np.concatenate([slope * added, named(gate, function)], axis=1), np.concatenate([off_gate, value_off], axis=1)


def _slope(z: Floats, off: Floats, function: Between) -> tuple[Floats, Floats]:
    """
    Return the derivative of `name(z)`, and how far it is off.

    Raises:
        ValueError: the name is not known.
    """
    evaluated = 128 * _ROUNDOFF * (1 + np.abs(z) + off)
    match function.name:
        case "silu":
            s = _sigmoid(function.alpha * z)
            slope, curvature = s * (1 + function.alpha * z * (1 - s)), 0.5 * abs(function.alpha)
        case "gelu":
            below = np.vectorize(math.erfc)(-z / math.sqrt(2)) / 2
            slope, curvature = below + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi), _OF_GELU
        case "gelu_tanh":
            s, inner = _sigmoid(2 * _ROOT * (z + 0.044715 * z**3)), 2 * _ROOT * (1 + 3 * 0.044715 * z**2)
            slope, curvature = s + z * s * (1 - s) * inner, _OF_GELU
        case "relu":
            return (z > 0).astype(np.float64), np.where(np.abs(z) <= off, 1.0, 0.0) + evaluated
        case "relu2":
            slope, curvature = 2 * np.maximum(z, 0.0), 2.0
        case _:
            raise ValueError(f"no rule for {function.name}")
    return slope, curvature * off + evaluated


def _sigmoid(t: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-t))
