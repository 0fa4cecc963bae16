"""
The kernel for few rows that shares one copy of the weights with products of x in FP8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug.rowlayout import LAYOUT_ID
from quantplug_marlin.rowfit import rows_verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class MarlinRowsKernel(LinearKernel):
    """
    `y = x W^T + b` for FP8 codes that lie row by row, as products of x in FP8 take them: those serve many rows out of
    the same tensors.

    x is never quantized, though the file permits it. Nothing is rounded but sums in float32, which are added up in a
    fixed order: results are the same every time.
    """

    __slots__ = ()

    name = "marlin.w8.rows"
    layout_id = LAYOUT_ID
    traits = Traits(uniform_segments=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept what fits into the layout, for bfloat16 and float16, on NVIDIA GPUs from compute capability 8.0 on."""
        return rows_verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Compile and try a small product whose result is known exactly."""
        from quantplug_marlin.probe import probe_rows

        return probe_rows() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep codes as they are, and scales in float32; on a GPU, have every kernel built that a call may need."""
        from quantplug.rowprepare import prepare

        prepared = prepare(problem, segments, activation, device, out)
        if device.type == "cuda":
            from quantplug_marlin.rowcalls import build

            build(prepared)
        return prepared

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply, cut as suits the number of rows."""
        from quantplug_marlin import rowcalls  # takes half as long as a name from within it

        return rowcalls.apply(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `code * scale`."""
        from quantplug.rowprepare import dequantize

        return dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where no scale was rounded on the way in."""
        from quantplug.rowprepare import unprepare

        return unprepare(prepared)
