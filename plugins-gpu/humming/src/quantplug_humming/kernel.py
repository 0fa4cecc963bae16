"""
The kernel: weights of 4 and 8 bits through humming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug_humming.fit import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class HummingKernel(LinearKernel):
    """
    `y = x W^T + b` for integers of 4 and 8 bits, float8_e4m3fn and float4_e2m1fn, x in bfloat16 and never quantized.

    humming cuts long sums into parts and adds them up in bfloat16, in the order in which they come: results differ from
    call to call.
    """

    __slots__ = ()

    name = "humming.w16"
    layout_id = "humming.tiles"
    traits = Traits(uniform_segments=True, deterministic=False)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept what humming takes without losing more than a rounding that can be declared."""
        return verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Look for the package; its kernels are compiled when a layer first runs, for each range of rows."""
        from quantplug_humming.probe import probe

        return probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Let humming pack codes and scales, on the GPU."""
        from quantplug_humming.prepare import prepare

        return prepare(problem, segments, device, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        from quantplug_humming.product import multiply

        return multiply(x, prepared, bias)
