"""
The hook of a kernel that runs a mixture of experts: routed rows through two products each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class MoEKernel(ABC):
    """
    One implementation of `quantplug.moe` on one family of machines; `quantplug_kernels` returns instances.

    Any `LinearKernel` serves experts already, one after the other (`loop.<its name>`); a kernel of this kind does so in
    one go. Imports, purity and state are as for a `LinearKernel`. What comes out of f may be rounded to the problem's
    dtype before the second product, and so may x times a router's weight that is on the input; every other rounding is
    declared (`Cast`): "gate_up", the first product before f, and "expert", an expert's output before the router's
    weight multiplies it or after, are the ones that only experts have.
    """

    __slots__ = ()

    name: ClassVar[str]
    """Unique among installed kernels of both kinds, family first: "triton.moe"."""
    layout_id: ClassVar[str]
    """Names what `prepare` yields; kernels that share it share one copy of the weights."""
    traits: ClassVar[Traits] = Traits()

    @abstractmethod
    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """
        Say whether this kernel can run the problem on that platform, as `LinearKernel.supports` does.

        The cost is that of a call of M rows of which each takes `top_k` experts.
        """

    def probe(self, platform: Platform) -> Rejected | None:
        """Check this very machine once, before anything is allocated, as `LinearKernel.probe` does."""
        return None

    @abstractmethod
    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """
        Bring canonical weights into this kernel's layout, once per layer after loading.

        Args:
            problem: what `supports` accepted.
            experts: the E experts in the order of their numbers, on the CPU, each decoded when it is asked for: take
                what is needed of one before asking for the next, and keep none. They stay the caller's.
            device: where the result lives.
            out: an earlier result of the same problem, to be overwritten in place (weight reload keeps addresses).
        """

    @abstractmethod
    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Return y `[M, H]` for x `[M, H]` in the problem's dtype; zero rows are allowed, every element is written.

        An id outside 0 … E-1 belongs to no expert here (padding, or an expert of another rank) and adds nothing; a row
        may name an expert more than once. x is not modified and may be non-contiguous. The caller has checked sizes,
        dtypes and devices.

        Args:
            x: `[M, H]`.
            topk_weights: float32 `[M, T]`, the router's; used as they are.
            topk_ids: int32 or int64 `[M, T]`.
            prepared: from `prepare` of a kernel with this `layout_id`.
            expert_map: integer `[E_global]`, the local number of every expert or -1; ids are global then.
        """

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's values, float32 `[I or 2I, H]` and `[H, I]`; optional."""
        raise NotImplementedError(f"kernel {self.name} does not dequantize")

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights again, bit-exact, without biases; optional."""
        raise NotImplementedError(f"kernel {self.name} has no way back")


Kernel = LinearKernel | MoEKernel
