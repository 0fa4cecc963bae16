"""
The kernels for experts that multiply FP8 weights by FP8 activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplug.kernel import Traits, Verdict
from quantplug_humming.experts import HummingExperts
from quantplug_humming.float8fit import float8_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class Float8HummingExperts(HummingExperts):
    """
    A mixture of experts in FP8, x and h quantized as the file permits.

    Sums move to float32 every 128 inputs: humming does so where a scale of x ends, and is told one for each of them.
    All else is as in `humming.moe`.
    """

    __slots__ = ()

    name = "humming.moe.w8a8"
    layout_id = "humming.experts.float8"
    traits = Traits(uniform_segments=True, deterministic=False)
    fast: ClassVar[bool] = False
    """Whether sums are never promoted to float32, rather than every 128 inputs."""

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """
        Accept float8_e4m3fn codes per tensor or channel with x in float8_e4m3fn per token, or in blocks of 128 x 128
        with x in groups of 128, on GPUs of compute capability 9.0.
        """
        return float8_verdict(problem, platform, fast=self.fast)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Let humming put codes in the order of its FP8 products, one expert after the other, on the GPU."""
        from quantplug_humming.expertprepare import prepare_experts

        return prepare_experts(problem, experts, device, self.layout_id, out, float8=True)

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Quantize, route, multiply, quantize, multiply, and add up."""
        from quantplug_humming.mixture import apply

        return apply(x, topk_weights, topk_ids, prepared, expert_map, promoted=not self.fast)


class FastFloat8HummingExperts(Float8HummingExperts):
    """
    The same with sums that stay in the short accumulator of the tensor cores, as inference engines have them: faster
    for many rows, and what is below 2^-13 of a sum so far is lost.
    """

    __slots__ = ()

    name = "humming.moe.w8a8.fast"
    traits = Traits(uniform_segments=True, deterministic=False, by_request=True)
    fast = True
