"""
What all kernels for experts of the zoo share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplug_testkit.plain_experts import PlainExperts, QuantizingExperts

if TYPE_CHECKING:
    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts


class BrokenExperts(PlainExperts):
    """
    The plain kernel for experts with one fault.

    Attributes:
        caught_by: the conformance tests that are named as catching it; others may, too.
    """

    caught_by: ClassVar[tuple[str, ...]] = ("test_result_is_within_the_derived_bound",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = f"zoo.{cls.__name__.lower()}"


class MisreadExperts(BrokenExperts):
    """Reads the weights wrongly when it multiplies; keeps them as they should be."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Return what is multiplied with instead of one expert's weights."""
        raise NotImplementedError

    def held(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Return an expert's weights as they are."""
        return super().weights(prepared, number)

    def weights(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Return misread weights."""
        return self.misread(self.held(prepared, number), prepared, number)


class MisledExperts(BrokenExperts):
    """Multiplies rightly, and something else than it was given."""

    def enter(self, x: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what takes the place of x and of the router's weights."""
        raise NotImplementedError

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Go on with that."""
        return super().apply(*self.enter(x, topk_weights), topk_ids, prepared, expert_map)


class MisquantizingExperts(QuantizingExperts, BrokenExperts):
    """The plain kernel that quantizes what enters the products, with one fault."""
