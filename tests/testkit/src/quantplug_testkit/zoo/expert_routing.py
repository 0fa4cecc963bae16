"""
Kernels for experts that send rows to the wrong expert, or weigh and add up rightly computed results wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_testkit.zoo.broken_experts import BrokenExperts

if TYPE_CHECKING:
    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem


class Reroutes(BrokenExperts):
    """Changes what the router said before it follows it."""

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return other weights and ids."""
        raise NotImplementedError

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run what it made of it."""
        weights, ids = self.reroute(topk_weights, topk_ids, prepared)
        return super().apply(x, weights, ids, prepared, expert_map)


class PaddingIsTheFirstExpert(BrokenExperts):
    """Clamps ids, so that padding goes to the ends."""

    caught_by = ("test_result_is_within_the_derived_bound", "test_padding_gives_exactly_zero")

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Clamp."""
        return super().locate(ids, expert_map, problem).clamp(0, problem.experts - 1)


class PaddingCountsFromTheEnd(BrokenExperts):
    """Takes -1 for the last expert, as indexing does."""

    caught_by = ("test_result_is_within_the_derived_bound", "test_padding_gives_exactly_zero")

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Let -1 be E - 1."""
        found = super().locate(ids, expert_map, problem)
        return torch.where(found == -1, problem.experts - 1, found)


class PaddingWrapsAround(BrokenExperts):
    """Takes the remainder of ids beyond E."""

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Wrap what is not negative."""
        found = super().locate(ids, expert_map, problem)
        return torch.where(found >= 0, found % problem.experts, found)


class MultipliesPaddingByZero(BrokenExperts):
    """Computes rows without an expert, and hides the result behind a factor of 0, which hides neither NaN nor Inf."""

    caught_by = ("test_padding_gives_exactly_zero",)

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return y + output * here


class MapIgnored(BrokenExperts):
    """Takes global numbers for local ones."""

    caught_by = ("test_expert_map_says_which_experts_are_here",)

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Leave ids as they are."""
        return ids


class MapTurnedRound(BrokenExperts):
    """Takes the map to give the global number of each local expert."""

    caught_by = ("test_expert_map_says_which_experts_are_here",)

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Turn it round."""
        if expert_map is None:
            return ids
        return super().locate(ids, torch.argsort(expert_map.long(), stable=True), problem)


class AbsentExpertsAreTheFirst(BrokenExperts):
    """Sends rows of experts that are elsewhere to expert 0."""

    caught_by = ("test_expert_map_says_which_experts_are_here",)

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Clamp the map."""
        return super().locate(ids, None if expert_map is None else expert_map.clamp(min=0), problem)


class WideIdsAlone(BrokenExperts):
    """Reads int32 ids as if they were int64: two at once."""

    caught_by = ("test_ids_may_be_of_either_width",)

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Take every second one, then what lies behind."""
        if ids.dtype == torch.int32:
            flat = torch.cat([ids.reshape(-1), ids.new_zeros(ids.numel())])
            ids = flat[::2].reshape(ids.shape)
        return super().locate(ids, expert_map, problem)


class UsedExpertsCounted(Reroutes):
    """Numbers the experts that have rows, and takes weights by that number."""

    caught_by = ("test_result_is_within_the_derived_bound", "test_experts_without_rows_add_nothing")

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Close the gaps."""
        here = (ids >= 0) & (ids < prepared.problem.experts)
        used = torch.bincount(ids[here].long(), minlength=prepared.problem.experts) > 0
        numbers = used.long().cumsum(0) - 1
        return weights, torch.where(here, numbers[ids.clamp(0, prepared.problem.experts - 1).long()], -1)


class FirstSlotAlone(Reroutes):
    """Takes one expert for each row."""

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop the other slots."""
        return weights[:, :1], ids[:, :1]


class WeightOfTheFirstSlot(Reroutes):
    """Multiplies all experts of a row by the weight of the first."""

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Repeat it."""
        return weights[:, :1].expand_as(weights), ids


class NormalizedWeights(Reroutes):
    """Makes the weights of a row add up to 1."""

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Divide by their sum."""
        return weights / weights.abs().sum(-1, keepdim=True), ids


class WeightsInTheDtype(Reroutes):
    """Rounds the router's weights to the problem's dtype."""

    caught_by = ("test_router_weights_are_used_as_they_are",)

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round."""
        return weights.to(getattr(torch, prepared.problem.dtype)).float(), ids


class NegativeWeightsDropped(Reroutes):
    """Takes a weight that is not positive for a padded slot."""

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clamp."""
        return weights.clamp(min=0), ids


class RepeatedIdOnce(Reroutes):
    """Runs an expert once for a row, with the weight of the slot that named it first."""

    caught_by = ("test_an_expert_named_twice_adds_twice",)

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad the others."""
        again = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
        return weights, torch.where(again, -1, ids)


class RowsBeyondATile(Reroutes):
    """Gives an expert 64 slots and no more."""

    caught_by = ("test_all_rows_may_take_one_expert",)

    def reroute(
        self, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad the rest."""
        kept = ids.clone()
        for number in range(prepared.problem.experts):
            places = (kept == number).reshape(-1).nonzero()[64:]
            kept.view(-1)[places] = -1
        return weights, kept


class WeightIgnored(BrokenExperts):
    """Adds the experts up as they are."""

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Do not multiply."""
        return self.expert(x, prepared, number)


class WeightTwice(BrokenExperts):
    """Multiplies by the router's weight in the product and again when it adds up."""

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Multiply again."""
        return super().weigh(x, factor, prepared, number) * factor


class WeightOnTheInput(BrokenExperts):
    """Multiplies x by the router's weight, through which the function bends."""

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Multiply before."""
        return self.expert(x * factor, prepared, number)


class WeightOnTheOutput(BrokenExperts):
    """Multiplies the result by the router's weight, also where it belongs on the input."""

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Multiply behind."""
        return self.expert(x, prepared, number) * factor


class SlotOverwritten(BrokenExperts):
    """Stores what an expert gives instead of adding it."""

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Keep the last."""
        return torch.where(here, output, y)


class AddsUpInBfloat16(BrokenExperts):
    """Adds the experts up in bfloat16."""

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Round each sum."""
        return super().add(y, output, here).bfloat16().float()


class AddsUpInTheDtype(BrokenExperts):
    """Adds the experts up in the problem's dtype, where nothing but storing y should round."""

    def weights(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Remember the dtype."""
        self._dtype = getattr(torch, prepared.problem.dtype)
        return super().weights(prepared, number)

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Round each sum."""
        return super().add(y, output, here).to(self._dtype).float()


class UndeclaredExpert(AddsUpInTheDtype):
    """Rounds what an expert gives before the router's weight multiplies it, and does not say so."""

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Add up in float32."""
        return y + torch.where(here, output, 0.0)

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Round, then multiply."""
        if prepared.problem.router_weight_on_input:
            return super().weigh(x, factor, prepared, number)
        output = self.expert(x, prepared, number)
        return output.to(self._dtype).float() * factor
