"""
The kernel for experts: routed rows through both products, without waiting for the router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug_triton.expertfit import experts_verdict
from quantplug_triton.kernel import TritonKernel

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class TritonExperts(MoEKernel):
    """
    A mixture of experts whose weights are multiplied as `triton.wna16` multiplies them, of every element type.

    The router's choices are put in the order of experts on the device. Gate and up are in one tile, and f is applied to
    their float32 sums; what an expert gives stays in float32 until all of a row's are added up, in the order of its
    choices. Nothing is rounded but h, to the dtype of x, and results are the same every time.
    """

    __slots__ = ()

    name = "triton.moe"
    layout_id = "triton.experts"
    traits = Traits(uniform_segments=True)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept what `triton.wna16` accepts for both products, gate and up in one contract."""
        return experts_verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Compile and try a small product whose result is known exactly."""
        return TritonKernel().probe(platform)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Pack one expert after the other into its place."""
        from quantplug_triton.expertprepare import prepare_experts

        return prepare_experts(problem, experts, device, self.layout_id, out)

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route, multiply twice, and add up, by one operator of torch."""
        from quantplug_triton.expertlaunch import call

        return call(x, topk_weights, topk_ids, prepared, expert_map)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's values, computed in float32 on the CPU."""
        import torch

        from quantplug_triton.expertprepare import weights_of

        found = weights_of(prepared, expert)
        return torch.cat([weight.dequantize(torch.float32) for weight in found.w13]), found.w2.dequantize(torch.float32)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights where nothing was rounded on the way in."""
        from quantplug_triton.expertprepare import weights_of

        if prepared.meta["rounded"]:
            raise NotImplementedError(f"kernel {self.name} holds float64 scales in float32: there is no exact way back")
        return weights_of(prepared, expert)
