"""
The kernel for experts: both products of all chosen experts in two launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug_marlin.expertfit import experts_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class MarlinExperts(MoEKernel):
    """
    A mixture of experts whose weights are multiplied as `marlin.wna16` multiplies them.

    Choices are put in the order of experts on the GPU; f is applied to float32 sums of gate and up; what each expert
    gives is rounded to the dtype of x, and added up in float32. No call waits for the router.
    """

    __slots__ = ()

    name = "marlin.moe"
    layout_id = "marlin.experts"
    traits = Traits(uniform_segments=True)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept what `marlin.wna16` accepts for every projection, but no act-order."""
        return experts_verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Compile and try a small product whose result is known exactly."""
        from quantplug_marlin.probe import probe

        return probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Lay out one expert after the other; on a GPU, have every kernel built that a call may need."""
        from quantplug_marlin.expertprepare import prepare_experts

        prepared = prepare_experts(problem, experts, device, self.layout_id, out)
        if device.type == "cuda":
            from quantplug_marlin.mixture import build

            build(prepared)
        return prepared

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route, multiply twice, and add up."""
        from quantplug_marlin.mixture import apply

        return apply(x, topk_weights, topk_ids, prepared, expert_map)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's values, by ordinary operators."""
        import torch

        from quantplug_marlin.expertprepare import weights_of

        *w13, w2 = weights_of(prepared, expert)
        return torch.cat([weight.dequantize(torch.float32) for weight in w13]), w2.dequantize(torch.float32)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights where nothing was rounded on the way in."""
        from quantplug_marlin.expertprepare import unprepare_expert

        return unprepare_expert(prepared, expert)
