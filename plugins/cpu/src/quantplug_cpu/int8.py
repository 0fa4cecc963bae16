"""
The kernel for 8-bit weights: torch's int8 operator where each row has one scale and no zero point, else two nibbles.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, LinearKernel, Rejected, Traits, Verdict
from quantplug.spec import PerGroup
from quantplug_cpu.accept import TILES, Rates, packed_verdict
from quantplug_cpu.fit import FAST_DTYPE, PACKED_SCALES, refuse
from quantplug_cpu.int4 import probe_packed
from quantplug_cpu.lazy import PRODUCTS, import_product

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight

STEP = 16
"""K must be a multiple of this: with any other the vectorised int8 operator reads out of bounds and crashes."""

_OPERATOR = Rates(6.0, 4.2e-5, 1.4e-5)
_MANY = Rates(60.0, 1.7e-4, 4.8e-6)


class Int8Kernel(LinearKernel):
    """
    `y = x W^T + b` with 8-bit codes.

    Signed codes with one scale per row keep their bytes, for the int8 operator. Groups and zero points have no 8-bit
    operator; a code is then the sum `16 * high + low` of two nibbles, which the int4 operator multiplies side by side
    with x given twice.
    """

    __slots__ = ()  # a compiled model checks every object that has attributes of its own, at every call

    name = "cpu.int8"
    layout_id = "cpu.int8"
    traits = Traits(uniform_segments=True, differentiable=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept 8-bit codes, of any shape and order, in groups of 16 inputs and more."""
        refusal = refuse(problem, platform, (8,), "cpu.int4")
        if refusal is not None:
            return refusal
        return _bytes_verdict(problem) if keeps_bytes(problem) else packed_verdict(problem, planes=2)

    def probe(self, platform: Platform) -> Rejected | None:
        """Try the operators on small products whose results are known exactly."""
        return (_probe_bytes() or probe_packed()) if platform.kind == "cpu" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep signed codes as they are (without a copy where they lie as needed), or pack their halves."""
        if keeps_bytes(problem):
            from quantplug_cpu.rowwise import prepare as prepare_rowwise

            import_product(0)
            return prepare_rowwise(problem, segments, activation, self.layout_id, out)
        from quantplug_cpu.prepare import prepare

        import_product(2)
        return prepare(problem, segments, 2, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply by an operator or by tiles, whichever is faster for that many rows."""
        planes = prepared.meta["planes"]
        return (PRODUCTS.get(planes) or import_product(planes))(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `(code - zero) * scale` with the scale as it is held."""
        if prepared.meta["planes"]:
            from quantplug_cpu.product import dequantize

            return dequantize(prepared, dtype)
        from quantplug_cpu.rowwise import dequantize as dequantize_rowwise

        return dequantize_rowwise(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where no scale was rounded on the way in."""
        if prepared.meta["planes"]:
            from quantplug_cpu.product import unprepare

            return unprepare(prepared, self.name)
        from quantplug_cpu.rowwise import unprepare as unprepare_rowwise

        return unprepare_rowwise(prepared, self.name)


def keeps_bytes(problem: LinearProblem) -> bool:
    """Return whether the int8 operator runs a problem: signed codes, one scale per row."""
    weight = problem.segments[0].weight
    if isinstance(weight.granularity, PerGroup) and (weight.granularity.size < problem.in_features or weight.act_order):
        # With act-order, even few inputs may belong to several groups: those of a part of a layer do.
        return False
    return weight.element.signed


def padded(inputs: int) -> int:
    """Return the number of inputs that are held, the empty ones included."""
    return -(-inputs // STEP) * STEP


def bytes_extra(problem: LinearProblem) -> int:
    """Return the bytes beyond the file's own where codes keep their bytes."""
    weight, n, k = problem.segments[0].weight, problem.out_features, problem.in_features
    held = 1 + n * (padded(k) + PACKED_SCALES[FAST_DTYPE if problem.dtype == FAST_DTYPE else weight.scale_dtype])
    held += 4 * k * len(problem.segments) if weight.act_order else 0
    if problem.activation is not None:
        # What cpu.w8a8 multiplies with: a scale and an offset per row, and what is stored about x.
        held += n * 8 + len(problem.segments) * 8
    return max(0, held - problem.stored_bytes)


def _bytes_verdict(problem: LinearProblem) -> Verdict:
    weight, n, k = problem.segments[0].weight, problem.out_features, problem.in_features
    held_inputs = padded(k)
    fast = problem.dtype == FAST_DTYPE
    casts: list[Cast] = []
    if fast:
        casts += [] if weight.scale_dtype == FAST_DTYPE else [Cast("scales", FAST_DTYPE)]
        casts.append(Cast("partials", FAST_DTYPE))
    notes = [] if held_inputs == k else [f"x is filled up from {k} to {held_inputs} inputs"]
    if not fast:
        notes.append(f"dequantizes tiles to float32 at every call; {FAST_DTYPE} has an operator of its own")
    weights = n * held_inputs
    return Accepted(
        replace(_OPERATOR.cost(weights), many=_MANY.cost(weights)) if fast else TILES.cost(weights),
        casts=tuple(casts),
        extra_bytes=bytes_extra(problem),
        notes=tuple(notes),
    )


@cache
def _probe_bytes() -> Rejected | None:
    """Return why the int8 operator cannot be used on this machine, or None."""
    import torch

    if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        return Rejected("probe", f"torch {torch.__version__} has no operator _weight_int8pack_mm", "use torch 2.9")
    codes = (torch.arange(64 * 64).view(64, 64) * 31 % 61 - 30).to(torch.int8)
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0, 3], x[0, 40], x[1, 63] = 1, -1, 2
    found = torch.ops.aten._weight_int8pack_mm(x, codes, torch.full((64,), 2.0, dtype=torch.bfloat16))
    # Small integers, which bfloat16 holds exactly.
    wanted = x.to(torch.float32) @ codes.t().to(torch.float32) * 2
    if not torch.equal(found.to(torch.float32), wanted):
        return Rejected("probe", f"a small int8 product is wrong with torch {torch.__version__}", "report it")
    return None
