"""
The kernel for experts: routed rows through humming's indexed product, twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug_humming.expertfit import experts_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class HummingExperts(MoEKernel):
    """
    A mixture of experts whose weights are multiplied as `humming.w16` multiplies them.

    Choices are put in the order of experts on the GPU, and no call waits for the router. Both products are rounded to
    bfloat16, f is applied in float32, and what experts give is added up in float32. Results differ from call to call,
    as those of `humming.w16` do.
    """

    __slots__ = ()

    name = "humming.moe"
    layout_id = "humming.experts"
    traits = Traits(uniform_segments=True, deterministic=False)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept what `humming.w16` accepts for both products, gate and up in one contract."""
        return experts_verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Look for humming and Triton; humming compiles when a layer first runs, for each range of rows."""
        from quantplug_humming.probe import probe_experts

        return probe_experts() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Let humming pack one expert after the other, on the GPU."""
        from quantplug_humming.expertprepare import prepare_experts

        return prepare_experts(problem, experts, device, self.layout_id, out)

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route, multiply twice, and add up."""
        from quantplug_humming.mixture import apply

        return apply(x, topk_weights, topk_ids, prepared, expert_map)
