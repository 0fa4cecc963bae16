"""
The kernel for 2-, 3- and 4-bit weights: torch's packed int4 operator, and dequantized tiles where that is faster.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug_cpu.accept import packed_verdict
from quantplug_cpu.fit import refuse
from quantplug_cpu.lazy import PRODUCTS, import_product
from quantplug_cpu.slots import ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class Int4Kernel(LinearKernel):
    """
    `y = x W^T + b` with nibbles, 2- and 3-bit codes included, and a scale per row and 32 inputs or more.

    In bfloat16 the operator multiplies few rows; for many, tiles of the weight are dequantized and multiplied. In other
    dtypes tiles in float32 are always faster than the operator, and as exact as can be.
    """

    __slots__ = ()  # a compiled model checks every object that has attributes of its own, at every call

    name = "cpu.int4"
    layout_id = "cpu.int4"
    traits = Traits(uniform_segments=True, differentiable=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept codes of up to 4 bits in groups of 16 inputs and more, of any shape and order."""
        return refuse(problem, platform, (2, 3, 4), "cpu.int8") or packed_verdict(problem, planes=1)

    def probe(self, platform: Platform) -> Rejected | None:
        """Try the operator on a small product whose result is known exactly."""
        return probe_packed() if platform.kind == "cpu" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Pack codes two to a byte, and scales with what zero points add, in the operator's order."""
        from quantplug_cpu.prepare import prepare

        import_product(1)
        return prepare(problem, segments, 1, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply by the operator or by tiles, whichever is faster for that many rows."""
        return (PRODUCTS.get(1) or import_product(1))(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `(code - zero) * scale` with the scale as it is held."""
        from quantplug_cpu.product import dequantize

        return dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where no scale was rounded on the way in."""
        from quantplug_cpu.product import unprepare

        return unprepare(prepared, self.name)


@cache
def probe_packed() -> Rejected | None:
    """Return why the packed int4 operator cannot be used on this machine, or None."""
    import torch

    operators = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    for operator in operators:
        if not hasattr(torch.ops.aten, operator):
            return Rejected("probe", f"torch {torch.__version__} has no operator {operator}", "use torch 2.9 or later")
    from quantplug_cpu.layout import Packer, detect

    layout = detect()
    if layout is None:
        return Rejected(
            "probe",
            f"torch {torch.__version__} packs int4 weights in an order this version does not know",
            "update quantplug-cpu",
        )
    codes = (torch.arange(64 * ROWS).view(64, ROWS) * 31 % 13).to(torch.uint8)
    packed = torch.empty(ROWS, 32, dtype=torch.uint8)
    Packer(packed, layout).write(codes, 0)
    pairs = torch.tensor([2.0, 1.0], dtype=torch.bfloat16).expand(2, ROWS, 2).contiguous()
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0, 3], x[0, 40], x[1, 63] = 1, -1, 2
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, pairs)
    # Small integers, which bfloat16 holds exactly.
    wanted = x.to(torch.float32) @ (codes.to(torch.float32) * 2 - 15)
    if not torch.equal(found.to(torch.float32), wanted):
        return Rejected("probe", f"a small int4 product is wrong with torch {torch.__version__}", "report it")
    return None
