"""
Kernels for experts whose results are right and whose derivatives are not, against their own word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from quantplug_testkit.zoo.broken_experts import BrokenExperts, MisledExperts

if TYPE_CHECKING:
    from quantplug.moe import ExpertFunction


class KeepsGradients(MisledExperts):
    """Says that it passes gradients on, and computes where autograd does not look."""

    caught_by = ("test_gradients_reach_x_and_the_router",)

    def enter(self, x: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut x off, and leave the router's weights."""
        return x.detach(), topk_weights


class KeepsTheRouters(MisledExperts):
    """Gives x its gradient, and the router none."""

    caught_by = ("test_gradients_reach_x_and_the_router",)

    def enter(self, x: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut the router's weights off."""
        return x, topk_weights.detach()


class LosesTangents(MisledExperts):
    """Passes gradients on, and computes as if x had no tangent."""

    caught_by = ("test_tangents_are_not_lost",)

    def enter(self, x: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take what x is without its tangent."""
        return forward_ad.unpack_dual(x).primal, topk_weights


class ForgetsTheGate(BrokenExperts):
    """Differentiates by up alone: what the gate lets through counts as fixed."""

    caught_by = ("test_gradients_reach_x_and_the_router",)

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Cut the function off."""
        return super().named(z.detach(), function)
