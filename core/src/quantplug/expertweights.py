"""
Experts as tensors: one expert's canonical weights, and all experts of a layer in the layout of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.moe import MoEProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """
    One expert in canonical form. It is transient: a loader has one or two of them at a time.

    Attributes:
        w13: gate and up, `[I, H]` each, or up alone.
        w2: down, `[H, I]`.
        b13: their biases `[I]` each, or ().
        b2: bias `[H]`, or None.
        a13: what the file stores about x, one per part of w13.
        a2: what it stores about the input of down.
    """

    w13: tuple[Weight, ...]
    w2: Weight
    b13: tuple[torch.Tensor, ...] = ()
    b2: torch.Tensor | None = None
    a13: tuple[ActivationParams | None, ...] = ()
    a2: ActivationParams | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PreparedExperts:
    """
    The experts of one layer in the layout of a kernel.

    Attributes:
        layout_id: names the layout; kernels with the same id can run the same `PreparedExperts`.
        problem: what they were prepared for.
        tensors: the kernel's own tensors by name, on the device they run on.
        meta: the kernel's own plain facts.
        parts: where a kernel for experts rests on one for linear layers, what that one prepared.
    """

    layout_id: str
    problem: MoEProblem
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[Prepared, ...] = ()

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, those of the parts under their number."""
        named = dict(self.tensors)
        for number, part in enumerate(self.parts):
            named |= {f"{number}.{name}": tensor for name, tensor in part.tensors.items()}
        return named

    @property
    def nbytes(self) -> int:
        """Bytes the tensors occupy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.named_tensors().values())
