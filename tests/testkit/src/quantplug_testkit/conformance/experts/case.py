"""
One kernel for experts on one hazard: prepared, run, and held against the oracle.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from quantplug.kernel import Accepted, Cast
from quantplug_testkit.canonical import to_float64
from quantplug_testkit.compare import assert_bitwise_equal, assert_within
from quantplug_testkit.conformance.asked import REASONS, Asked
from quantplug_testkit.conformance.experts.hazard import ExpertHazard, oracle_layer
from quantplug_testkit.conformance.experts.problems import EXPERT_CATALOGUE, UNUSUAL_EXPERTS
from quantplug_testkit.conformance.experts.routing import Routing, route
from quantplug_testkit.expertbounds import EXPERT_CASTS, mixture_bound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.moekernel import MoEKernel
    from quantplug.platform import Platform
    from quantplug.spec import WeightSpec
    from quantplug_testkit.conformance.experts.routing import Kind


class ExpertSubject(Asked):
    """
    What a vendor's conformance class states, and what the tests read of it.

    Attributes:
        kernel: the kernel under test.
    """

    kernel: MoEKernel
    known_casts = EXPERT_CASTS
    reasons = (*REASONS, "function")

    def questions(self) -> Sequence[MoEProblem]:
        """Return the catalogue, and what is unusual."""
        return (*(hazard.problem for hazard in EXPERT_CATALOGUE), *UNUSUAL_EXPERTS)

    def weights_of(self, problem: MoEProblem) -> Sequence[WeightSpec]:
        """Return one contract per projection."""
        return [*problem.w13, problem.w2]

    def sizes_of(self, problem: MoEProblem) -> set[int]:
        """Return E, T, H, I, and the rows of gate and up together."""
        rows = len(problem.w13) * problem.intermediate
        return {problem.experts, problem.top_k, problem.hidden, problem.intermediate, rows}

    def words_of(self, code: str, problem: MoEProblem) -> set[str]:
        """Return the function and its parts, where a refusal is about it."""
        return {problem.function.name, "gate", "limit", "alpha", "up"} if code == "function" else set()

    def accepted(self) -> list[ExpertHazard]:
        """
        Return the hazards that the kernel accepts on the platform.

        Problems whose permission to quantize x it leaves unused are those of the weights alone, and the first family
        will do.
        """
        found: list[ExpertHazard] = []
        unused = ""
        for hazard in EXPERT_CATALOGUE:
            verdict = self.kernel.supports(hazard.problem, self.platform)
            if not isinstance(verdict, Accepted):
                continue
            if hazard.problem.activation is not None and not verdict.quantizes_x:
                unused = unused or hazard.family
                if hazard.family != unused:
                    continue
            found.append(hazard)
        return found

    def case(self, hazard: ExpertHazard) -> ExpertCase:
        """Return the kernel prepared for a hazard."""
        return ExpertCase(self.kernel, self.platform, torch.device(self.device), hazard)


class ExpertCase:
    """A layer of experts that is ready to run, and the oracle's view of it."""

    def __init__(self, kernel: MoEKernel, platform: Platform, device: torch.device, hazard: ExpertHazard) -> None:
        verdict = kernel.supports(hazard.problem, platform)
        if not isinstance(verdict, Accepted):
            raise AssertionError(f"{kernel.name} accepted {hazard.name} before and now does not: {verdict}")
        self.kernel = kernel
        self.device = device
        self.hazard = hazard
        self.casts: tuple[Cast, ...] = verdict.casts
        self.quantizes_x = verdict.quantizes_x
        self.extra_bytes = verdict.extra_bytes

    @cached_property
    def prepared(self) -> PreparedExperts:
        """What the kernel made of the hazard's experts."""
        return self.prepare()

    def prepare(self, seed: int = 0, out: PreparedExperts | None = None) -> PreparedExperts:
        """Let the kernel prepare the hazard's experts, which come one by one."""
        return self.kernel.prepare(self.hazard.problem, self.experts(seed), self.device, out)

    def experts(self, seed: int = 0) -> Iterator[ExpertWeights]:
        """Yield the hazard's experts, each made when it is asked for."""
        return (self.hazard.expert(number, seed) for number in range(self.hazard.problem.experts))

    def inputs(self, rows: int, seed: int = 0) -> torch.Tensor:
        """Return x `[rows, H]` on the device."""
        return self.hazard.inputs(rows, seed).to(self.device)

    def route(self, rows: int, kind: Kind = "mixed", seed: int = 0) -> Routing:
        """Return a routing on the device."""
        return route(self.hazard, rows, kind, seed).to(self.device)

    def apply_plainly(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Run the kernel and nothing else, as a model does."""
        return self.kernel.apply(x, routing.weights, routing.ids, self.prepared, routing.expert_map)

    def apply(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Run the kernel; shape, dtype and device of the result are checked, its values are not."""
        __tracebackhide__ = True
        y = self.apply_plainly(x, routing)
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            shape = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise AssertionError(f"x {list(x.shape)} gives y {shape} [{self.hazard.name}]")
        if y.dtype != x.dtype or y.device != x.device:
            raise AssertionError(f"y is {y.dtype} on {y.device}, not {x.dtype} on {x.device} as x is")
        return y

    def check(self, x: torch.Tensor, routing: Routing, y: torch.Tensor, what: str) -> None:
        """Assert that y is what the experts make of x, quantized if that is declared, within the derived bound."""
        __tracebackhide__ = True
        problem = self.hazard.problem
        if self.quantizes_x and problem.activation is None:
            raise AssertionError(f"{self.kernel.name} quantizes x, which {self.hazard.name} does not permit")
        exact, bound = mixture_bound(
            to_float64(x),
            routing.factors(),
            routing.chosen(problem.experts),
            oracle_layer(self.hazard, quantizes_x=self.quantizes_x),
            problem.dtype,
            self.casts,
        )
        assert_within(y, exact, bound, f"{what} [{self.hazard.name}]")

    def check_again(
        self, first: torch.Tensor, second: torch.Tensor, x: torch.Tensor, routing: Routing, what: str
    ) -> None:
        """Assert that two results are equal to the bit, or within the bound if that is not declared."""
        __tracebackhide__ = True
        if self.kernel.traits.deterministic:
            assert_bitwise_equal(second, first, f"{what} [{self.hazard.name}]")
        else:
            self.check(x, routing, second, what)
