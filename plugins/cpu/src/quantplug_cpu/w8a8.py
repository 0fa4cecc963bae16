"""
The kernel for 8-bit weights whose file permits to quantize x to 8 bits: torch's int8 product of both.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, LinearKernel, Rejected, Traits, Verdict
from quantplug.spec import ElementType
from quantplug_cpu.accept import Rates
from quantplug_cpu.fit import refuse
from quantplug_cpu.int8 import Int8Kernel, bytes_extra, keeps_bytes, padded
from quantplug_cpu.lazy import PRODUCTS, import_product

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import ActivationSpec, LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight

_RATES = Rates(28.0, 3.6e-5, 4.0e-6)

_MOST_INPUTS = 1 << 16
"""Sums of so many products of two 8-bit codes, and of what a zero point adds to each, fit into 32 bits."""


class W8A8Kernel(LinearKernel):
    """
    `y = x W^T + b` with x quantized to 8 bits, per token or as a whole, by scales computed from x or stored.

    Products of codes are summed exactly in int32; scales multiply the sums, in float32. What it needs of a weight is
    what `cpu.int8` needs, so that they share a layout and a plan can choose either by the number of rows.
    """

    __slots__ = ()  # a compiled model checks every object that has attributes of its own, at every call

    name = "cpu.w8a8"
    layout_id = Int8Kernel.layout_id
    traits = Traits(uniform_segments=True, differentiable=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept signed 8-bit codes with one scale per row, and x as int8, or as uint8 with a stored zero point."""
        refusal = refuse(problem, platform, (8,), "cpu.int4") or _refuse_activation(problem.activation)
        if refusal is not None:
            return refusal
        weight = problem.segments[0].weight
        if not weight.element.signed:
            return Rejected("element", f"{weight.element} codes have zero points", "cpu.int8 takes them")
        if not keeps_bytes(problem):
            return Rejected("granularity", f"scales change along a row: {weight.describe()}", "cpu.int8 takes them")
        if problem.in_features > _MOST_INPUTS:
            return Rejected("shape", f"in_features is {problem.in_features}", f"at most {_MOST_INPUTS}")
        return Accepted(
            _RATES.cost(problem.out_features * padded(problem.in_features)),
            extra_bytes=bytes_extra(problem),
            quantizes_x=True,
        )

    def probe(self, platform: Platform) -> Rejected | None:
        """Try the operator where processors without an instruction for it are wrong."""
        return _probe() if platform.kind == "cpu" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep codes as they are, without a copy where they lie as needed, and scales in float32."""
        from quantplug_cpu.rowwise import prepare

        import_product("w8a8")
        import_product(0)
        return prepare(problem, segments, activation, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x and multiply codes."""
        return (PRODUCTS.get("w8a8") or import_product("w8a8"))(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `code * scale`."""
        from quantplug_cpu.rowwise import dequantize

        return dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments."""
        from quantplug_cpu.rowwise import unprepare

        return unprepare(prepared, self.name)


def _refuse_activation(activation: ActivationSpec | None) -> Rejected | None:
    """Return why x cannot be quantized as a file permits, or None."""
    if activation is None:
        return Rejected("activation", "the file permits none", "cpu.int8 leaves x as it is")
    if not takes(activation):
        return Rejected(
            "activation",
            f"x as {activation.describe()}",
            "int8 per token or per tensor, dynamic or static, or uint8 static; cpu.int8 and cpu.dense leave x as it is",
        )
    return None


def takes(activation: ActivationSpec | None) -> bool:
    """Return whether x may be quantized, and in a way that is taken."""
    if activation is None:
        return False
    if activation.scale_dtype != "float32" or activation.global_scale or activation.granularity == "group":
        return False
    if activation.element is ElementType.INT8:
        return activation.dynamic or activation.granularity == "tensor"
    return activation.element is ElementType.UINT8 and not activation.dynamic and activation.granularity == "tensor"


@cache
def _probe() -> Rejected | None:
    """Return why the product of int8 codes cannot be used on this machine, or None."""
    import torch

    if not hasattr(torch, "_int_mm"):
        return Rejected("probe", f"torch {torch.__version__} has no operator _int_mm", "use torch 2.9 or later")
    # Sums of two products of the largest codes overflow 16 bits, which is where some processors' instructions saturate.
    codes = torch.full((64, 64), -128, dtype=torch.int8)
    codes[1::2] = 127
    for rows in (1, 17):
        x = codes[:rows]
        wanted = (x.to(torch.int64) @ codes.t().to(torch.int64)).to(torch.int32)
        if not torch.equal(torch._int_mm(x, codes.t()), wanted):
            return Rejected(
                "probe", f"a small product of int8 codes is wrong with torch {torch.__version__}", "report it"
            )
    return None
