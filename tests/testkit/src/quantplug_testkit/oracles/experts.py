"""
A mixture of experts in float64: rows routed through two products each, and what lies between these.

For each row of x and each expert e that its ids name, with the router's weight r:

    h = f(x W13[e]^T + b13[e]),   y += r (h W2[e]^T + b2[e])

W13 is gate and up, one below the other, or up alone. `f(gate, up) = name(min(gate, limit)) * (clamp(up, -limit, limit)
+ up_offset)`, and `f(up) = name(up)` where there is no gate. An id that is no number of an expert adds nothing; an id
that occurs twice adds twice. Where the router's weight is on the input, x is multiplied by it instead of what the
expert gives. Where x is quantized, what enters either product is, each projection by what is stored for it.

Sources: `name` and its limits as in Hugging Face Transformers, modeling_gpt_oss.py (limit 7, alpha 1.702, up_offset 1)
and activations.py; "gelu_tanh" from Hendrycks and Gimpel, Gaussian Error Linear Units, section 2.

A worked example: one row that names expert 1 twice and one that is not here; the expert doubles, then halves.

>>> double, halve = (Segment.of([[code]], [[1.0]], None, None, -1, 8) for code in (2, 0.5))
>>> expert = Expert((double,), halve)
>>> layer = Layer((expert, expert), Function("relu", gated=False))
>>> mixture(np.array([[3.0]]), np.array([[1.0, 0.5, 9.0]]), np.array([[1, 1, 7]]), layer).tolist()
[[4.5]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quantplug_testkit.oracles.activation import Quantized, quantize
from quantplug_testkit.oracles.canonical import Segment
from quantplug_testkit.oracles.linear import fused_linear

if TYPE_CHECKING:
    from quantplug_testkit.oracles.activation import Permission
    from quantplug_testkit.oracles.canonical import Floats, Integers


class Between(Protocol):
    """What lies between the products; the core's `ExpertFunction` is one."""

    @property
    def name(self) -> str:
        """One of `NAMES`."""

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""

    @property
    def limit(self) -> float | None:
        """Bound on gate from above, and on up from both sides."""

    @property
    def alpha(self) -> float:
        """Factor within the sigmoid of "silu"."""

    @property
    def up_offset(self) -> float:
        """What is added to up."""


@dataclass(frozen=True, slots=True)
class Function:
    """What lies between the products, in plain terms."""

    name: str
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file stores about the x of one projection."""

    scale: float | None = None
    zero: int = 0
    global_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """
    One expert as plain numbers.

    Attributes:
        first: gate and up, `[I, H]` each, or up alone.
        second: down, `[H, I]`.
        b13: float64 `[2I]` or `[I]`, or None.
        b2: float64 `[H]`, or None.
        stored13: what is stored about x, one per part of `first`, where x is quantized.
        stored2: what is stored about what enters `second`.
    """

    first: tuple[Segment, ...]
    second: Segment
    b13: Floats | None = None
    b2: Floats | None = None
    stored13: tuple[Stored, ...] = ()
    stored2: Stored = Stored()


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """
    The experts of one layer.

    Attributes:
        experts: in the order of their numbers.
        function: what lies between the products.
        permission: how x is quantized, or None when the kernel leaves it as it is.
        weight_on_input: whether the router's weight multiplies x.
    """

    experts: tuple[Expert, ...]
    function: Between
    permission: Permission | None = None
    weight_on_input: bool = False


def mixture(x: Floats, weights: Floats, chosen: Integers, layer: Layer) -> Floats:
    """
    Return y `[M, H]`.

    Args:
        x: float64 `[M, H]`, exactly what the kernel was given.
        weights: float64 `[M, T]`, the router's.
        chosen: int64 `[M, T]`, numbers of experts; any other number belongs to none.
        layer: the experts.
    """
    y = np.zeros((len(x), layer.experts[0].second.codes.shape[0]))
    for number, expert in enumerate(layer.experts):
        rows, slots = np.nonzero(chosen == number)
        if not rows.size:
            continue
        factor = weights[rows, slots][:, None]
        before, after = (factor, 1.0) if layer.weight_on_input else (1.0, factor)
        np.add.at(y, rows, after * run(before * x[rows], expert, layer))
    return y


def run(x: Floats, expert: Expert, layer: Layer) -> Floats:
    """Return what one expert makes of x `[M, H]`, without the router's weight."""
    inputs = operands(x, expert.stored13, len(expert.first), layer.permission)
    product = fused_linear([each.values for each in inputs], [part.values() for part in expert.first], expert.b13)
    (operand,) = operands(apply_function(product, layer.function), (expert.stored2,), 1, layer.permission)
    return fused_linear([operand.values], [expert.second.values()], expert.b2)


def operands(
    x: Floats, stored: tuple[Stored, ...], parts: int, permission: Permission | None, off: Floats | float = 0.0
) -> list[Quantized]:
    """
    Return what x `[M, K]` becomes for each part of a weight.

    Args:
        x: float64.
        stored: what is stored about x, for each part.
        parts: their number.
        permission: how x is quantized, or None.
        off: how far the x of a right kernel may be from it.

    Raises:
        ValueError: one dynamic scale for all of x, for nobody says whether that is all rows or those of one expert.
    """
    if permission is None:
        return [Quantized(x, np.zeros_like(x) + off, np.ones_like(x))] * parts
    if permission.dynamic and permission.granularity == "tensor":
        raise ValueError(f"no rule for experts for {permission}")
    return [
        quantize(x, permission, scale=each.scale, zero=each.zero, global_scale=each.global_scale, off=off)
        for each in stored
    ]


def locate(ids: Integers, expert_map: Integers | None) -> Integers:
    """Return the numbers of the experts that ids `[M, T]` name, by a map from all experts' numbers, or -1 for none."""
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < len(expert_map))
    found: Integers = np.where(known, expert_map[np.where(known, ids, 0)], -1)
    return found


def apply_function(product: Floats, function: Between) -> Floats:
    """Return f of a first product: `[M, I]` for `[M, 2I]`, gate then up, or for up alone `[M, I]`."""
    if not function.gated:
        return named(product, function)
    gate, up = np.split(product, 2, axis=1)
    if function.limit is not None:
        gate, up = np.minimum(gate, function.limit), np.clip(up, -function.limit, function.limit)
    return named(gate, function) * (up + function.up_offset)


def named(z: Floats, function: Between) -> Floats:
    """
    Return `name(z)`, element by element.

    Raises:
        ValueError: the name is not known.
    """
    match function.name:
        case "silu":
            return z * _sigmoid(function.alpha * z)
        case "gelu":
            return z * _normal(z)
        case "gelu_tanh":
            return z * _sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        case "relu":
            return np.maximum(z, 0.0)
        case "relu2":
            return np.maximum(z, 0.0) ** 2
    raise ValueError(f"no rule for {function.name}")


def _sigmoid(t: Floats) -> Floats:
    """`1 / (1 + e^-t)`; `(1 + tanh(t / 2)) / 2` is the same."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-t))


def _normal(z: Floats) -> Floats:
    """The probability that a standard normal number is below z."""
    return np.array([math.erfc(-each / math.sqrt(2)) / 2 for each in z.ravel()]).reshape(z.shape)
