"""
The tests that every kernel of linear layers must pass.

A vendor writes, in a test file of its own:

    class TestMyKernel(LinearKernelConformance):
        kernel = MyKernel()
        platform = Platform.parse("cuda:9.0")
        device = "cuda"

and nothing else. The problems come from a fixed catalogue (`problems.CATALOGUE`), of which the kernel's own `supports`
selects those that it is tried on. On the CPU it is tried on all of them; elsewhere, where each form has to be compiled,
on a covering selection (`covering.py`), unless `QUANTPLUG_CATALOGUE=whole` asks for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug_testkit.conformance.aspects import aspects_of
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.covering import covering, generate, pairs, whole_catalogue
from quantplug_testkit.conformance.derivatives import DerivativeTests
from quantplug_testkit.conformance.intact import assert_intact, standard_names
from quantplug_testkit.conformance.prepare import PrepareTests
from quantplug_testkit.conformance.problems import CATALOGUE, Hazard
from quantplug_testkit.conformance.product import ROWS, ProductTests
from quantplug_testkit.conformance.runtime import RuntimeTests

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from quantplug.spec import LinearProblem

__all__ = ["CATALOGUE", "Hazard", "LinearKernelConformance", "standard_tests"]


ARGUMENTS = (("hazard", "rows"), ("hazard",), ("family",), ("sample",))
"""What standard tests take, by name."""


class LinearKernelConformance(PrepareTests, ProductTests, RuntimeTests, DerivativeTests, ContractTests):
    """Subclass it, name it `Test…`, set `kernel`, and `platform` and `device` where they are not the CPU."""

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """The problems are too small to gain from threads, and on a busy machine lose by them; one test has three."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test its hazards, out of those that the kernel accepts: see `given`."""
        generate(metafunc, ARGUMENTS, lambda names: self.given(names, whole=whole_catalogue(self.device)))

    def given(self, names: tuple[str, ...], *, whole: bool) -> list[tuple[Hazard, *tuple[int, ...]]]:
        """
        Return what tests are given that take arguments of these names.

        Tests of numbers take a `hazard`, and one of them a number of `rows`; tests of memory and calling take a
        `family`; tests of the compiler and of devices take a `sample`. Of the whole catalogue, tests of numbers see
        each hazard with each number of rows, and the others each family in one dtype. Of a covering selection, tests of
        numbers see each family and each pair of aspects, of which the number of rows is one, and tests of memory and
        calling each aspect.
        """
        match names:
            case ("hazard", *rows):
                numbers = [(count,) for count in ROWS] if rows else [()]
                hazards = [(hazard, *number) for hazard in self.accepted() for number in numbers]
                return hazards if whole else covering(hazards, _family_and_pairs)
            case ("family",):
                families = self.families()
                if not whole:
                    families = covering(families, lambda hazard: aspects_of(hazard).items())
                return [(hazard,) for hazard in families]
            case _:
                return [(hazard,) for hazard in self.samples()]

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


def _family_and_pairs(given: tuple[Hazard, *tuple[int, ...]]) -> list[Hashable]:
    hazard, *rows = given
    found = pairs({**aspects_of(hazard), "rows": tuple(rows)})
    if rows == [0]:
        # no numbers, in which nothing but that can be wrong
        return [pair for pair in found if ("rows", (0,)) in pair]
    return [hazard.family, *found]


def standard_tests() -> tuple[str, ...]:
    """Return the names of the standard tests, in alphabetical order."""
    return tuple(name for name in standard_names(LinearKernelConformance) if name.startswith("test_"))
