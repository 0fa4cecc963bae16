"""
Kernels whose arithmetic is right and whose word is not: `supports`, `probe`, `prepare` and what they declare.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from quantplug.kernel import Accepted, Cost, Rejected, Verdict
from quantplug.weight import ActivationParams, Prepared, Weight
from quantplug_testkit.zoo.broken import Broken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem

FOREIGN = "hypothesis.extra.array_api"
"""A module of another distribution that nothing here loads."""


class Nameless(Broken):
    """Has a name that no policy could spell."""

    caught_by = ("test_name_layout_and_traits_are_well_formed",)


Nameless.name = "My Kernel (fast!)"


class KeepsGradients(Broken):
    """Says that it passes gradients on, and computes where autograd does not look."""

    caught_by = ("test_gradients_reach_x",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Cut x off."""
        return super().apply(x.detach(), prepared, bias)


class ScalesGradients(Broken):
    """Passes twice the gradient on."""

    caught_by = ("test_gradients_reach_x",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Let autograd see 2 x - x with the second x cut off."""
        return super().apply(2 * x - x.detach(), prepared, bias)


class LosesTangents(Broken):
    """Passes gradients on, and computes as if x had no tangent."""

    caught_by = ("test_tangents_reach_y",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Take what x is without its tangent."""
        return super().apply(forward_ad.unpack_dual(x).primal, prepared, bias)


class ScalesTangents(Broken):
    """Passes twice the tangent on, and the gradient as it is."""

    caught_by = ("test_tangents_reach_y",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Give x its tangent twice."""
        plain, tangent = forward_ad.unpack_dual(x)
        given = x if tangent is None else forward_ad.make_dual(plain, 2 * tangent)
        return super().apply(given, prepared, bias)


class RaisesWhenAsked(Broken):
    """Answers a question that it did not expect with an exception."""

    caught_by = ("test_supports_answers_every_question",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Raise for more than three segments."""
        if len(problem.segments) > 3:
            raise ValueError("too many segments")
        return super().supports(problem, platform)


class ChangesItsMind(Broken):
    """Asks for less every time."""

    caught_by = ("test_supports_gives_the_same_answer_every_time",)

    def __init__(self) -> None:
        self._asked = 0

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Let the cost follow the number of questions."""
        verdict = super().supports(problem, platform)
        self._asked += 1
        return replace(verdict, cost=Cost(self._asked, 1)) if isinstance(verdict, Accepted) else verdict


class CountsProcessors(Broken):
    """Answers for the machine that it is asked on instead of the platform that it is asked about."""

    caught_by = ("test_supports_does_not_look_at_the_machine",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Divide the cost by the processors at hand."""
        verdict = super().supports(problem, platform)
        if isinstance(verdict, Rejected):
            return verdict
        return replace(verdict, cost=Cost(verdict.cost.fixed_us / (os.cpu_count() or 1), verdict.cost.row_us))


class ImportsWhenAsked(Broken):
    """Loads its vendor's package to answer a question."""

    caught_by = ("test_supports_imports_nothing_foreign",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Import first."""
        importlib.import_module(FOREIGN)
        return super().supports(problem, platform)


class CostsNothing(Broken):
    """Claims a cost that puts it before all others."""

    caught_by = ("test_accepting_is_well_formed",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Claim to be faster than time."""
        verdict = super().supports(problem, platform)
        return replace(verdict, cost=Cost(-1e9, 0)) if isinstance(verdict, Accepted) else verdict


class RefusesWithoutReason(Broken):
    """Says no, and not to what."""

    caught_by = ("test_refusing_names_the_offending_value",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Refuse odd sizes."""
        if problem.in_features % 2:
            return Rejected("shape", "this shape is not supported")
        return super().supports(problem, platform)


class RefusesEverything(Broken):
    """Passes every test of numbers by running none."""

    caught_by = ("test_accepts_something_on_its_platform",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Refuse."""
        return Rejected("dtype", f"activation dtype {problem.dtype}")


class MissingOperator(Broken):
    """Accepts a platform on which its operator is not there."""

    caught_by = ("test_probe_passes_on_this_machine",)

    def probe(self, platform: Platform) -> Rejected | None:
        """Refuse."""
        return Rejected("dependency", "torch.ops.zoo.product is not registered")


class AnotherLayout(Broken):
    """Marks what it prepares with a layout that it does not claim."""

    caught_by = ("test_prepare_says_what_it_made",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Mislabel the result."""
        return replace(super().prepare(problem, segments, activation, device, out), layout_id="zoo")


class ChangesTheWeights(Broken):
    """Folds a factor into the caller's own scales."""

    caught_by = ("test_prepare_leaves_the_weights_alone",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Double the scales after they were taken over."""
        copies = [replace(weight, scales=weight.scales.clone()) for weight in segments]
        for weight in segments:
            weight.scales.mul_(2)
        return super().prepare(problem, copies, activation, device, out)


class PreparesAtRandom(Broken):
    """Leaves padding in its layout that nobody writes."""

    caught_by = ("test_preparing_twice_gives_the_same_bits",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Add sixteen bytes of whatever was there."""
        prepared = super().prepare(problem, segments, activation, device, out)
        padding = torch.randint(0, 256, (16,), dtype=torch.uint8)
        return replace(prepared, tensors={**prepared.tensors, "padding": padding})


class PreparesElsewhere(Broken):
    """Takes new memory when it was given the old."""

    caught_by = ("test_preparing_again_keeps_addresses",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Ignore `out`."""
        return super().prepare(problem, segments, activation, device)


class KeepsOldScales(Broken):
    """Overwrites codes on reload and forgets the rest."""

    caught_by = ("test_preparing_again_keeps_addresses",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Write the codes only."""
        if out is None:
            return super().prepare(problem, segments, activation, device)
        for number, weight in enumerate(segments):
            out.tensors[f"codes.{number}"].copy_(weight.codes)
        return out


class ContiguousWeights(Broken):
    """Reads canonical tensors as if rows lay one after the other."""

    caught_by = ("test_prepare_takes_weights_of_any_stride",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Take the memory of the codes in the order in which it lies."""
        read = [
            replace(weight, codes=weight.codes.as_strided(weight.codes.shape, (weight.in_features, 1)).clone())
            for weight in segments
        ]
        return super().prepare(problem, read, activation, device, out)


class UndeclaredMemory(Broken):
    """Keeps a dense copy of the weight on the side."""

    caught_by = ("test_memory_is_as_declared",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Add the float32 values."""
        prepared = super().prepare(problem, segments, activation, device, out)
        values = torch.cat([weight.dequantize() for weight in segments])
        return replace(prepared, tensors={**prepared.tensors, "values": values})


class DequantizesTwice(Broken):
    """Rounds dense values on the way to the dtype that was asked for."""

    caught_by = ("test_dequantize_gives_the_values",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply with the right values."""
        values = super().dequantize(prepared, torch.float32)
        return torch.nn.functional.linear(x.float(), values, None if bias is None else bias.float()).to(x.dtype)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Go through float16."""
        return super().dequantize(prepared, torch.float16).to(dtype)


class ForgetsOnTheWayBack(Broken):
    """Gives the weights back without their order."""

    caught_by = ("test_unprepare_gives_the_weights_back",)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Use the segments as they are held."""
        return torch.cat([weight.dequantize(dtype) for weight in super().unprepare(prepared)])

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Drop g_idx."""
        return tuple(replace(weight, g_idx=None) for weight in super().unprepare(prepared))
