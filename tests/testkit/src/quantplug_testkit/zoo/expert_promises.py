"""
Kernels for experts whose arithmetic is right and whose word is not: `supports`, `probe`, `prepare` and the way back.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.kernel import Accepted, Cost, Rejected, Verdict
from quantplug_testkit.canonical import weight_tensors
from quantplug_testkit.plain_experts import PlainExperts
from quantplug_testkit.zoo.broken_experts import BrokenExperts
from quantplug_testkit.zoo.promises import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform


class Nameless(BrokenExperts):
    """Has a name that no policy could spell."""

    caught_by = ("test_name_layout_and_traits_are_well_formed",)


Nameless.name = "My Experts (fast!)"


class RaisesWhenAsked(BrokenExperts):
    """Answers a question that it did not expect with an exception."""

    caught_by = ("test_supports_answers_every_question",)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Divide by the number of experts."""
        return super().supports(problem, platform) if 1 // problem.experts < 2 else Rejected("shape", "experts is 0")


class ChangesItsMind(BrokenExperts):
    """Asks for less every time."""

    caught_by = ("test_supports_gives_the_same_answer_every_time",)

    def __init__(self) -> None:
        self._asked = 0

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Let the cost follow the number of questions."""
        verdict = super().supports(problem, platform)
        self._asked += 1
        return replace(verdict, cost=Cost(self._asked, 1)) if isinstance(verdict, Accepted) else verdict


class CountsProcessors(BrokenExperts):
    """Answers for the machine that it is asked on instead of the platform that it is asked about."""

    caught_by = ("test_supports_does_not_look_at_the_machine",)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Divide the cost by the processors at hand."""
        verdict = super().supports(problem, platform)
        if isinstance(verdict, Rejected):
            return verdict
        return replace(verdict, cost=Cost(verdict.cost.fixed_us / (os.cpu_count() or 1), verdict.cost.row_us))


class ImportsWhenAsked(BrokenExperts):
    """Loads its vendor's package to answer a question."""

    caught_by = ("test_supports_imports_nothing_foreign",)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Import first."""
        importlib.import_module(FOREIGN)
        return super().supports(problem, platform)


class CostsNothing(BrokenExperts):
    """Claims a cost that puts it before all others."""

    caught_by = ("test_accepting_is_well_formed",)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Claim to be faster than time."""
        verdict = super().supports(problem, platform)
        return replace(verdict, cost=Cost(-1e9, 0)) if isinstance(verdict, Accepted) else verdict


class RefusesWithoutReason(BrokenExperts):
    """Says no, and not to what."""

    caught_by = ("test_refusing_names_the_offending_value",)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Refuse functions but one."""
        if problem.function.name != "silu":
            return Rejected("function", "this model is not supported")
        return super().supports(problem, platform)


class RefusesEverything(BrokenExperts):
    """Passes every test of numbers by running none."""

    caught_by = ("test_accepts_something_on_its_platform",)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Refuse."""
        return Rejected("dtype", f"activation dtype {problem.dtype}")


class MissingOperator(BrokenExperts):
    """Accepts a platform on which its operator is not there."""

    caught_by = ("test_probe_passes_on_this_machine",)

    def probe(self, platform: Platform) -> Rejected | None:
        """Refuse."""
        return Rejected("dependency", "torch.ops.zoo.experts is not registered")


class AnotherLayout(BrokenExperts):
    """Marks what it prepares with a layout that it does not claim."""

    caught_by = ("test_prepare_says_what_it_made",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Mislabel the result."""
        return replace(super().prepare(problem, experts, device, out), layout_id="zoo")


class HoldsAllExperts(BrokenExperts):
    """Makes a list of the experts first."""

    caught_by = ("test_experts_are_taken_one_by_one",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Hold all of them."""
        return super().prepare(problem, list(experts), device, out)


class StacksInTheEnd(BrokenExperts):
    """Collects the codes of all experts, and brings them into its layout in the end."""

    caught_by = ("test_experts_are_taken_one_by_one",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Hold the codes."""
        codes: list[torch.Tensor] = []

        def watched() -> Iterable[ExpertWeights]:
            for expert in experts:
                codes.append(expert.w2.codes)
                yield expert

        return super().prepare(problem, watched(), device, out)


class StopsEarly(BrokenExperts):
    """Asks for one expert less than there are, and keeps the last one twice."""

    caught_by = ("test_experts_are_taken_one_by_one", "test_result_is_within_the_derived_bound")

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Repeat the last but one."""

        def fewer() -> Iterable[ExpertWeights]:
            for number, expert in enumerate(experts):
                yield expert
                if number == problem.experts - 2:
                    yield expert
                    return

        return super().prepare(problem, fewer(), device, out)


class ReadsListsBackwards(BrokenExperts):
    """Takes a list for something that it may sort."""

    caught_by = ("test_experts_of_a_list_are_taken_alike",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Start at the end."""
        return super().prepare(problem, experts[::-1] if isinstance(experts, list) else experts, device, out)


class ChangesTheExperts(BrokenExperts):
    """Folds a factor into the caller's own scales."""

    caught_by = ("test_prepare_leaves_the_experts_alone",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Double the scales after they were taken over."""

        def doubled() -> Iterable[ExpertWeights]:
            for expert in experts:
                yield expert
                expert.w2.scales.copy_(expert.w2.scales.float() * 2)

        return super().prepare(problem, doubled(), device, out)


class PreparesElsewhere(BrokenExperts):
    """Takes new memory when it was given the old."""

    caught_by = ("test_preparing_again_keeps_addresses",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Ignore `out`."""
        return super().prepare(problem, experts, device)


class KeepsOldScales(BrokenExperts):
    """Overwrites codes on reload and forgets the rest."""

    caught_by = ("test_preparing_again_keeps_addresses",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Write the codes only."""
        if out is None:
            return super().prepare(problem, experts, device)
        for number, expert in enumerate(experts):
            out.tensors[f"{number}.w2.codes"].copy_(expert.w2.codes)
            for part, weight in enumerate(expert.w13):
                out.tensors[f"{number}.w13.{part}.codes"].copy_(weight.codes)
        return out


class ContiguousWeights(BrokenExperts):
    """Reads canonical tensors as if rows lay one after the other."""

    caught_by = ("test_prepare_takes_weights_of_any_stride",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Take the memory of down's codes in the order in which it lies."""
        shape = (problem.hidden, problem.intermediate)
        read = (
            replace(e, w2=replace(e.w2, codes=e.w2.codes.as_strided(shape, (problem.intermediate, 1)).clone()))
            for e in experts
        )
        return super().prepare(problem, read, device, out)


class UndeclaredMemory(BrokenExperts):
    """Keeps dense copies of the weights on the side."""

    caught_by = ("test_memory_is_as_declared",)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Add the float32 values."""
        prepared = super().prepare(problem, experts, device, out)
        values = {f"{n}.dense": self.dequantize(prepared, n)[0] for n in range(problem.experts)}
        return replace(prepared, tensors={**prepared.tensors, **values})


class NeedsItsOwnMemory(BrokenExperts):
    """Remembers addresses: what it prepared cannot be copied."""

    caught_by = ("test_deepcopy_is_independent",)

    def __init__(self) -> None:
        self._known: dict[MoEProblem, PreparedExperts] = {}

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Look the experts up by the problem that they were prepared for."""
        known = self._known.setdefault(prepared.problem, prepared)
        return super().apply(x, topk_weights, topk_ids, known, expert_map)


class DequantizesThroughFloat16(BrokenExperts):
    """Rounds dense values on the way."""

    caught_by = ("test_dequantize_gives_the_values",)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Go through float16."""
        first, second = super().dequantize(prepared, expert)
        return first.half().float(), second.half().float()


class ForgetsOnTheWayBack(BrokenExperts):
    """Gives the weights back without their order."""

    caught_by = ("test_unprepare_gives_the_weights_back",)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Drop g_idx."""
        weights = super().unprepare(prepared, expert)
        return replace(weights, w2=replace(weights.w2, g_idx=None))


class ClobbersPrepared(BrokenExperts):
    """Unpacks the weights over themselves."""

    caught_by = ("test_apply_leaves_its_operands_alone",)

    def expert(self, x: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Change the scales after their use."""
        output = PlainExperts.expert(self, x, prepared, number)
        scales = weight_tensors(self.weights(prepared, number).w2)["scales"]
        scales.copy_(scales.float() * 2)
        return output
