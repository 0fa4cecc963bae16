"""
The tests that every kernel of linear layers must pass.

A vendor writes, in a test file of its own:

    class TestMyKernel(LinearKernelConformance):
        kernel = MyKernel()
        platform = Platform.parse("cuda:9.0")
        device = "cuda"

and nothing else. The problems come from a fixed catalogue (`problems.CATALOGUE`), of which the kernel's own `supports`
selects those that it is tried on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.intact import assert_intact, standard_names
from quantplug_testkit.conformance.prepare import PrepareTests
from quantplug_testkit.conformance.problems import CATALOGUE, Hazard
from quantplug_testkit.conformance.product import ProductTests
from quantplug_testkit.conformance.runtime import RuntimeTests

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug.spec import LinearProblem

__all__ = ["CATALOGUE", "Hazard", "LinearKernelConformance", "standard_tests"]


class LinearKernelConformance(PrepareTests, ProductTests, RuntimeTests, ContractTests):
    """Subclass it, name it `Test…`, set `kernel`, and `platform` and `device` where they are not the CPU."""

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """The problems are too small to gain from threads, and on a busy machine lose by them; one test has three."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """
        Give each test its hazards, out of those that the kernel accepts.

        Tests of numbers take a `hazard` and see them all; tests of memory and calling take a `family` and see each in
        one dtype; tests of the compiler take a `sample`.
        """
        for argument, hazards in (("hazard", self.accepted), ("family", self.families), ("sample", self.samples)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, [pytest.param(hazard, id=hazard.name) for hazard in hazards()])

    def families(self) -> list[Hazard]:
        """Return each accepted family once, in dtypes that take turns."""
        found: dict[str, list[Hazard]] = {}
        for hazard in self.accepted():
            found.setdefault(hazard.family, []).append(hazard)
        return [dtypes[turn % len(dtypes)] for turn, dtypes in enumerate(found.values())]

    def samples(self) -> list[Hazard]:
        """
        Return the first accepted hazard of each kind: fused, floating point of 8 and of 4 bits, act-order, with a bias,
        and none of these; and for each type that x is quantized to, by scales of either kind.
        """
        kinds: dict[str, Hazard] = {}
        for hazard in self.accepted():
            kinds.setdefault(self._kind(hazard.problem), hazard)
        return list(kinds.values())

    def _kind(self, problem: LinearProblem) -> str:
        verdict = self.kernel.supports(problem, self.platform)
        if problem.activation is not None and isinstance(verdict, Accepted) and verdict.quantizes_x:
            return f"{problem.activation.element} {problem.activation.dynamic}"
        if len(problem.segments) > 1:
            return "fused"
        weight = problem.segments[0].weight
        if weight.element.floating:
            return f"float{weight.element.bits}"
        if weight.act_order:
            return "act-order"
        return "bias" if problem.bias else "plain"

    def test_standard_tests_are_intact(self) -> None:
        """
        No standard test is deleted, overridden or weakened unless it is marked `xfail` with a reason.

        A test that cannot pass yet is overridden by one that calls it, under `@pytest.mark.xfail(reason="…")`.
        """
        assert_intact(type(self), LinearKernelConformance)


def standard_tests() -> tuple[str, ...]:
    """Return the names of the standard tests, in alphabetical order."""
    return tuple(name for name in standard_names(LinearKernelConformance) if name.startswith("test_"))
