"""
The kernel for 4-bit floating-point weights: twice a code is an integer, which the int4 operator multiplies in halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug.spec import SCALE_BYTES, ElementType
from quantplug_cpu.accept import packed_verdict
from quantplug_cpu.fit import refuse_unpacked
from quantplug_cpu.int4 import probe_packed
from quantplug_cpu.lazy import PRODUCTS, import_product

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class Float4Kernel(LinearKernel):
    """
    `y = x W^T + b` with codes of float4_e2m1fn in groups of 32 inputs and more (MXFP4).

    Twice a code's value is an integer from -12 to 12. It is laid out as `cpu.int8` lays out a code with a scale of its
    group: in two nibbles. Groups of 16 (NVFP4) would take four nibbles, with which a dense copy is as fast and smaller.
    """

    __slots__ = ()  # a compiled model checks every object that has attributes of its own, at every call

    name = "cpu.float4"
    layout_id = "cpu.float4"
    traits = Traits(uniform_segments=True, differentiable=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept float4_e2m1fn with scales of any dtype, in groups of about 32 inputs and more, of any shape."""
        refusal = refuse_unpacked(problem, platform)
        if refusal is not None:
            return refusal
        weight = problem.segments[0].weight
        if weight.element is not ElementType.FLOAT4_E2M1FN:
            other = "cpu.dense" if weight.element.floating else f"cpu.int{8 if weight.element.bits == 8 else 4}"
            return Rejected("element", f"codes are {weight.element}", f"{other} takes them")
        if weight.scale_dtype not in SCALE_BYTES:
            return Rejected("dtype", f"scales in {weight.scale_dtype}", f"use one of {', '.join(SCALE_BYTES)}")
        return packed_verdict(problem, planes=2, least_group=32)

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
        """Pack the halves of twice each code, and half of each scale, global scale included."""
        from quantplug_cpu.doubled import doubled
        from quantplug_cpu.prepare import prepare

        import_product(2)
        return prepare(problem, [doubled(weight) for weight in segments], 2, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply by the operator or by tiles, whichever is faster for that many rows."""
        return (PRODUCTS.get(2) or import_product(2))(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `code * scale` with the scale as it is held."""
        from quantplug_cpu.product import dequantize

        return dequantize(prepared, dtype)
