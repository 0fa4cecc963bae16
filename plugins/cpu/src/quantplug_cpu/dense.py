"""
The kernel for every format: weights dequantized once, when the layer is prepared, and multiplied as those of a dense
layer are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, Cost, LinearKernel, Rejected, Traits, Verdict
from quantplug.spec import SCALE_BYTES
from quantplug_cpu.accept import Rates
from quantplug_cpu.fit import DTYPE_BYTES, refuse_anywhere
from quantplug_cpu.lazy import PRODUCTS, import_product

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight

_RATES = {
    "bfloat16": Rates(12.0, 1.3e-4, 4.5e-6),
    "float16": Rates(12.0, 7.0e-5, 2.0e-5),
    "float32": Rates(12.0, 2.2e-4, 1.5e-5),
}
"""Measured as those in `accept` are, by activation dtype."""

_EXTRA_BYTE_US = 5.0e-4
"""
What each byte beyond the file's own adds to the estimate, microseconds per call. It is no time that the product takes:
it is the price of memory, set so that a packed layout is left for a dense copy only where the copy is several times as
fast. A copy undoes what a checkpoint was quantized for, and takes memory from all that runs beside it.
"""


class DenseKernel(LinearKernel):
    """
    `y = x W^T + b` with W held in the dtype of x.

    Any element type, granularity, scale dtype, order of inputs and shape, segments of different contracts included.
    It is for formats that no operator of torch multiplies with as they are stored, floating-point ones above all: those
    run at the speed of a dense layer, and take as many bytes.
    """

    __slots__ = ()  # a compiled model checks every object that has attributes of its own, at every call

    name = "cpu.dense"
    layout_id = "cpu.dense"
    traits = Traits(differentiable=True, tangents=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept every problem in a float dtype, and say what it costs in memory."""
        refusal = refuse_anywhere(problem, platform)
        if refusal is not None:
            return refusal
        for segment in problem.segments:
            if segment.weight.scale_dtype not in SCALE_BYTES:
                known = ", ".join(SCALE_BYTES)
                return Rejected("dtype", f"scales in {segment.weight.scale_dtype}", f"use one of {known}")
        weights, stored = problem.in_features * problem.out_features, problem.stored_bytes
        held = weights * DTYPE_BYTES[problem.dtype]
        extra = max(0, held - stored)
        cost = _RATES[problem.dtype].cost(weights)
        return Accepted(
            Cost(cost.fixed_us + extra * _EXTRA_BYTE_US, cost.row_us),
            casts=() if problem.dtype == "float32" else (Cast("weights", problem.dtype),),
            extra_bytes=extra,
            notes=(f"weights are held in {problem.dtype}, {held / stored:.1f} times their bytes in the file",),
        )

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Dequantize in float32, some rows at a time, and round once."""
        from quantplug_cpu.whole import prepare

        import_product("dense")
        return prepare(problem, segments, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply as a dense layer."""
        return (PRODUCTS.get("dense") or import_product("dense"))(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the values as they are held."""
        return prepared.tensors["weight"].to(dtype, copy=True)
