"""
The kernel: quantized weights, multiplied as they are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug_marlin.fit import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class MarlinKernel(LinearKernel):
    """
    `y = x W^T + b` for integers of 2, 3, 4 and 8 bits, FP8 and FP4, with any granularity and act-order.

    x is never quantized. Codes are exact in the dtype of x, and scales multiply float32 sums, so that nothing else is
    rounded. Sums are added up in a fixed order: results are the same every time.
    """

    __slots__ = ()

    name = "marlin.wna16"
    layout_id = "marlin.tiles"
    traits = Traits(uniform_segments=True, dequantize_graph_safe=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept every element type for bfloat16 and float16, on NVIDIA GPUs from compute capability 8.0 on."""
        return verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Compile and try a small product whose result is known exactly."""
        from quantplug_marlin.probe import probe

        return probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Lay codes out as lanes take them; on a GPU, have every kernel built that a call may need."""
        from quantplug_marlin.prepare import prepare

        prepared = prepare(problem, segments, device, self.layout_id, out)
        if device.type == "cuda":
            from quantplug_marlin.calls import build

            build(prepared)
        return prepared

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply, with a kernel that suits the number of rows."""
        from quantplug_marlin import calls  # takes half as long as a name from within it

        return calls.apply(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the values `[N, K]`, computed in float32 and rounded once."""
        from quantplug_marlin.calls import dequantize

        return dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where nothing was rounded on the way in."""
        from quantplug_marlin.unpack import unprepare

        return unprepare(prepared)
