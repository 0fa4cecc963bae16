"""
The kernel: weights in FP8, in blocks, times x in FP8, in groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug.rowlayout import LAYOUT_ID
from quantplug_deepgemm.fit import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class DeepGemmKernel(LinearKernel):
    """
    `y = x W^T + b` with x quantized to FP8 as the file permits, through DeepGEMM.

    Sums are promoted to float32, and scaled, every 128 inputs. Results are the same every time. DeepGEMM compiles when
    a call needs what was not compiled before, for 2 to 8 seconds, also while a graph is captured: see README.md.
    """

    __slots__ = ()

    name = "deepgemm.w8a8"
    layout_id = LAYOUT_ID
    traits = Traits(uniform_segments=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept float8_e4m3fn in blocks of 128 x 128, x in groups of 128, on GPUs of compute capability 9.0."""
        return verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Look for the package and its compiler, and try a small product whose result is known exactly."""
        from quantplug_deepgemm.probe import probe

        return probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep codes as they are, filled up as the layout says, and scales in float32."""
        from quantplug.rowprepare import prepare

        return prepare(problem, segments, activation, device, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x and multiply."""
        from quantplug_deepgemm.product import multiply

        return multiply(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `code * scale`."""
        from quantplug.rowprepare import dequantize

        return dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where no scale was rounded on the way in."""
        from quantplug.rowprepare import unprepare

        return unprepare(prepared)
