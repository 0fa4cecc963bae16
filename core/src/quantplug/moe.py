"""
What a kernel for a mixture of experts is asked to run. Constructing these values needs no torch.

For each row of x `[M, H]` and each expert e that the router chose for it, with weight r:

    h = f(x W13[e]^T + b13[e])          first product, `[I]` after the function
    y += r * (h W2[e]^T + b2[e])        second product, `[H]`

W13 is the gate and the up projection, in this order, each `[I, H]`; experts without a gate have up alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantplug.spec import ActivationSpec, LinearProblem, SegmentSpec, WeightSpec

FunctionName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, slots=True)
class ExpertFunction:
    """
    The function f between the two products, element by element.

    Gated: `f(gate, up) = name(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)`; without a gate:
    `f(up) = name(up)`.

    Attributes:
        name: "silu" is `z * sigmoid(alpha * z)`; "gelu" the exact form, "gelu_tanh" the other; "relu2" `relu(z)^2`.
        gated: whether there is a gate projection.
        limit: bound on gate (from above) and up (from both sides), or None.
        alpha: factor within the sigmoid of "silu".
        up_offset: what is added to up. gpt-oss ("swigluoai") has limit 7, alpha 1.702, up_offset 1.
    """

    name: FunctionName = "silu"
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0

    def describe(self) -> str:
        """Return a short human form such as `silu, gated`."""
        parts = [self.name, "gated" if self.gated else "no gate"]
        parts += [f"limit {self.limit:g}"] if self.limit is not None else []
        parts += [f"alpha {self.alpha:g}"] if self.alpha != 1.0 else []
        parts += [f"up + {self.up_offset:g}"] if self.up_offset else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class MoEProblem:
    """
    The routed experts of one layer. All experts share one numeric contract for each projection.

    Attributes:
        experts: E, those held here.
        top_k: T, experts chosen for each row.
        hidden: H, features of x and y.
        intermediate: I, features between the products.
        w13: contracts of gate and up, or of up alone.
        w2: contract of down.
        function: what lies between the products.
        dtype: torch name of the dtype of x and y ("bfloat16", "float16", "float32").
        bias: whether every projection has a bias.
        activation: the file's permission to quantize what enters each product, or None for weight-only.
        router_weight_on_input: whether the router's weight multiplies x instead of the expert's output (T = 1 only).
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    w13: tuple[WeightSpec, ...]
    w2: WeightSpec
    function: ExpertFunction
    dtype: str
    bias: bool = False
    activation: ActivationSpec | None = None
    router_weight_on_input: bool = False

    @property
    def first(self) -> LinearProblem:
        """The first product of one expert, as a linear layer whose segments are gate and up."""
        segments = tuple(SegmentSpec(self.intermediate, spec) for spec in self.w13)
        return LinearProblem(self.hidden, segments, self.dtype, self.bias, self.activation)

    @property
    def second(self) -> LinearProblem:
        """The second product of one expert, as a linear layer."""
        segment = SegmentSpec(self.hidden, self.w2)
        return LinearProblem(self.intermediate, (segment,), self.dtype, self.bias, self.activation)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all experts at their stored width, see `LinearProblem.stored_bytes`."""
        return self.experts * (self.first.stored_bytes + self.second.stored_bytes)

    @property
    def uniform(self) -> bool:
        """Whether all projections share one numeric contract."""
        return len({*self.w13, self.w2}) == 1

    def describe(self) -> str:
        """Return the problem in words: `8 experts [256, 128] top 2, int4 group 64, silu, gated, bfloat16`."""
        kinds = " + ".join(dict.fromkeys(spec.describe() for spec in (*self.w13, self.w2)))
        return (
            f"{self.experts} experts [{self.intermediate}, {self.hidden}] top {self.top_k}, {kinds}, "
            f"{self.function.describe()}, {self.dtype}"
        )
