"""
The kernel for experts: FP8 weights times FP8 activations, through torch's grouped product.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

from quantplug.expertrows import LAYOUT_ID
from quantplug.kernel import Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug_cublas.expertfit import experts_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class CublasExperts(MoEKernel):
    """
    A mixture of experts in FP8, x and h quantized as the file permits, each product of all experts in one launch.

    Rows are put in the order of experts on the GPU and no call waits for the router. Products are rounded to bfloat16,
    which is what the operator writes; everything else is float32, and a row's experts are added up in the order in
    which it names them.
    """

    __slots__ = ()

    name = "cublas.moe"
    layout_id = LAYOUT_ID
    traits = Traits()
    fast: ClassVar[bool] = False
    """Whether sums are never promoted to float32 ("fast accumulation"), rather than every 128 inputs."""

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """
        Accept float8_e4m3fn codes per tensor or channel with x in float8_e4m3fn per token, or by stored scales, in
        bfloat16 on GPUs of compute capability 9.0.
        """
        return experts_verdict(problem, platform, fast=self.fast)

    def probe(self, platform: Platform) -> Rejected | None:
        """Try a small mixture whose result is known exactly."""
        return _probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Keep codes as they are, filled up to what the operator takes, and a float32 scale for every row."""
        from quantplug.expertrowprepare import prepare_experts

        return prepare_experts(problem, experts, device, out)

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Route, multiply twice, and add up."""
        from quantplug_cublas.mixture import apply

        return apply(x, topk_weights, topk_ids, prepared, expert_map, fast=self.fast)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `code * scale` of one expert."""
        from quantplug.expertrowprepare import dequantize

        return dequantize(prepared, expert)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights where no scale was rounded on the way in."""
        from quantplug.expertrowprepare import unprepare

        return unprepare(prepared, expert)


class FastCublasExperts(CublasExperts):
    """
    The same with sums that stay in the short accumulator of the tensor cores, as inference engines have them: faster
    for many rows, and what is below 2^-13 of a sum so far is lost.
    """

    __slots__ = ()

    name = "cublas.moe.fast"
    traits = Traits(by_request=True)
    fast = True


@cache
def _probe() -> Rejected | None:
    """Return why the kernel cannot be used on this machine, or None."""
    import torch

    from quantplug_cublas.mixture import experts

    if not hasattr(torch, "_scaled_grouped_mm"):
        reason = f"torch {torch.__version__} has no operator _scaled_grouped_mm"
        return Rejected("probe", reason, "use torch 2.9 or later")
    # relu of 16 equal codes, halved by scales, then 32 of them: 3 rows of x are 0, 1 and 2 throughout.
    x = torch.arange(3.0, device="cuda").bfloat16()[:, None].expand(3, 16)
    ids, weights = torch.tensor([[1, 0], [0, 5], [1, 1]], device="cuda"), torch.ones(3, 2, device="cuda")
    codes = [torch.ones(2, n, k, device="cuda").to(torch.float8_e4m3fn) for n, k in ((32, 16), (16, 32))]
    scales = [torch.full((2, n), 0.5, device="cuda") for n in (32, 16)]
    try:
        y = experts(
            x, weights, ids, None, codes[0], scales[0], None, None, codes[1], scales[1], None, None, 32, False,
            "relu", False, None, 1.0, 0.0, False,
        )  # fmt: skip
    except RuntimeError as error:
        return Rejected("probe", f"torch {torch.__version__}: {error}".splitlines()[0], "use torch 2.9 or later")
    wanted = torch.tensor([0.0, 128.0, 512.0], device="cuda")[:, None].expand(3, 16)
    if not torch.allclose(y.to(torch.float32), wanted, rtol=2**-7, atol=0):
        return Rejected("probe", f"a small mixture is wrong with torch {torch.__version__}", "report it")
    return None
