"""
The kernel for experts that multiplies FP8 weights by FP8 activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.expertrows import LAYOUT_ID
from quantplug.kernel import Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug_marlin.float8fit import float8_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class MarlinFloat8Experts(MoEKernel):
    """
    A mixture of experts in FP8, x and h quantized as the file permits.

    Sums move to float32 every 128 inputs. What the first product gives, and each expert, is rounded to the dtype of x;
    f is computed in float32, and a row's experts are added up in float32 in the order in which it names them. No call
    waits for the router, and results are the same every time.
    """

    __slots__ = ()

    name = "marlin.moe.w8a8"
    layout_id = LAYOUT_ID
    traits = Traits(uniform_segments=True)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """
        Accept float8_e4m3fn codes per tensor or channel with x in float8_e4m3fn per token, for bfloat16 and float16, on
        GPUs of compute capability 9.0.
        """
        return float8_verdict(problem, platform)

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
        """Keep codes as they are, and scales in float32; on a GPU, have every kernel built that a call may need."""
        from quantplug.expertrowprepare import prepare_experts

        prepared = prepare_experts(problem, experts, device, out)
        if device.type == "cuda":
            from quantplug_marlin.float8mixture import build

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
        """Route, quantize, multiply, quantize, multiply, and add up."""
        from quantplug_marlin.float8mixture import apply

        return apply(x, topk_weights, topk_ids, prepared, expert_map)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `code * scale` of one expert."""
        from quantplug.expertrowprepare import dequantize

        return dequantize(prepared, expert)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights where no scale was rounded on the way in."""
        from quantplug.expertrowprepare import unprepare

        return unprepare(prepared, expert)
