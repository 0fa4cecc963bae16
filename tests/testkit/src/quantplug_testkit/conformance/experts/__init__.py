"""
The tests that every kernel for experts must pass.

A vendor writes, in a test file of its own:

    class TestMyExperts(MoEKernelConformance):
        kernel = MyExperts()
        platform = Platform.parse("cuda:9.0")
        device = "cuda"

and nothing else. The layers come from a fixed catalogue (`problems.EXPERT_CATALOGUE`), of which the kernel's own
`supports` selects those that it is tried on: all of them on the CPU, elsewhere a covering selection (`covering.py`),
unless `QUANTPLUG_CATALOGUE=whole` asks for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.covering import covering, generate, pairs, whole_catalogue
from quantplug_testkit.conformance.experts.aspects import aspects_of_experts
from quantplug_testkit.conformance.experts.derivatives import ExpertDerivativeTests
from quantplug_testkit.conformance.experts.hazard import ExpertHazard
from quantplug_testkit.conformance.experts.prepare import ExpertPrepareTests
from quantplug_testkit.conformance.experts.problems import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.product import ROWS, ExpertProductTests
from quantplug_testkit.conformance.experts.runtime import ExpertRuntimeTests
from quantplug_testkit.conformance.intact import assert_intact, standard_names

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

__all__ = ["EXPERT_CATALOGUE", "ExpertHazard", "MoEKernelConformance", "standard_expert_tests"]


ARGUMENTS = (("hazard", "rows"), ("family",), ("form",), ("sample",))
"""What standard tests take, by name."""


class MoEKernelConformance(
    ExpertPrepareTests, ExpertProductTests, ExpertRuntimeTests, ExpertDerivativeTests, ContractTests
):
    """Subclass it, name it `Test…`, set `kernel`, and `platform` and `device` where they are not the CPU."""

    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """The layers are too small to gain from threads, and on a busy machine lose by them; one test has three."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test its hazards, out of those that the kernel accepts: see `given`."""
        generate(metafunc, ARGUMENTS, lambda names: self.given(names, whole=whole_catalogue(self.device)))

    def given(self, names: tuple[str, ...], *, whole: bool) -> list[tuple[ExpertHazard, *tuple[int, ...]]]:
        """
        Return what tests are given that take arguments of these names.

        Tests of numbers take a `hazard` and a number of `rows`; tests of routing take a `family`; tests of memory and
        calling take a `form`; tests of the compiler and of devices take a `sample`. Of the whole catalogue, tests of
        numbers see each hazard with each number of rows, tests of routing each family in one dtype, and tests of memory
        and calling each format once. Of a covering selection, tests of numbers see each family and each pair of
        aspects, of which the number of rows is one, and tests of routing, memory and calling each aspect.
        """
        if names == ("hazard", "rows"):
            products: list[tuple[ExpertHazard, *tuple[int, ...]]]
            products = [(hazard, rows) for hazard in self.accepted() for rows in ROWS]
            return products if whole else covering(products, _family_and_pairs)
        hazards = {"family": self.families, "form": self.forms, "sample": self.samples}[names[0]]()
        if not whole and names != ("sample",):
            hazards = covering(hazards, lambda hazard: aspects_of_experts(hazard).items())
        return [(hazard,) for hazard in hazards]

    def families(self) -> list[ExpertHazard]:
        """Return each accepted family once, in dtypes that take turns."""
        found: dict[str, list[ExpertHazard]] = {}
        for hazard in self.accepted():
            found.setdefault(hazard.family, []).append(hazard)
        return [dtypes[turn % len(dtypes)] for turn, dtypes in enumerate(found.values())]

    def forms(self) -> list[ExpertHazard]:
        """Return the first family with each element type, order, permission, and with or without biases and a gate."""
        found: dict[tuple[object, ...], ExpertHazard] = {}
        for hazard in self.families():
            problem = hazard.problem
            specs = tuple((spec.element, spec.act_order, spec.global_scale) for spec in (*problem.w13, problem.w2))
            found.setdefault((specs, problem.bias, problem.activation), hazard)
        return list(found.values())

    def samples(self) -> list[ExpertHazard]:
        """Return an accepted hazard with biases or act-order, and one with neither, each with the fewest experts."""
        found: dict[bool, ExpertHazard] = {}
        for hazard in sorted(self.accepted(), key=lambda hazard: hazard.problem.experts):
            problem = hazard.problem
            found.setdefault(problem.bias or any(spec.act_order for spec in problem.w13), hazard)
        return list(found.values())

    def test_standard_tests_are_intact(self) -> None:
        """
        No standard test is deleted, overridden or weakened unless it is marked `xfail` with a reason.

        A test that cannot pass yet is overridden by one that calls it, under `@pytest.mark.xfail(reason="…")`.
        """
        assert_intact(type(self), MoEKernelConformance)


def _family_and_pairs(given: tuple[ExpertHazard, *tuple[int, ...]]) -> list[Hashable]:
    hazard, *rows = given
    return [hazard.family, *pairs({**aspects_of_experts(hazard), "rows": tuple(rows)})]


def standard_expert_tests() -> tuple[str, ...]:
    """Return the names of the standard tests, in alphabetical order."""
    return tuple(name for name in standard_names(MoEKernelConformance) if name.startswith("test_"))
