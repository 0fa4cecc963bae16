"""
One kernel on one hazard: prepared, run, and held against the oracle.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from quantplug.kernel import Accepted, Cast, LinearKernel
from quantplug_testkit.activation import quantized
from quantplug_testkit.bounds import CASTS, linear_bound
from quantplug_testkit.canonical import segment_of, to_float64
from quantplug_testkit.compare import assert_bitwise_equal, assert_within
from quantplug_testkit.conformance.asked import Asked
from quantplug_testkit.conformance.problems import CATALOGUE, UNUSUAL, Hazard
from quantplug_testkit.oracles.linear import fused_linear, linear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem, WeightSpec
    from quantplug_testkit.oracles.activation import Quantized
    from quantplug_testkit.oracles.canonical import Floats, Segment


class Subject(Asked):
    """
    What a vendor's conformance class states, and what the tests read of it.

    Attributes:
        kernel: the kernel under test.
    """

    kernel: LinearKernel
    known_casts = CASTS

    def questions(self) -> Sequence[LinearProblem]:
        """Return the catalogue, and what is unusual."""
        return (*(hazard.problem for hazard in CATALOGUE), *UNUSUAL)

    def weights_of(self, problem: LinearProblem) -> Sequence[WeightSpec]:
        """Return one contract per segment."""
        return [segment.weight for segment in problem.segments]

    def sizes_of(self, problem: LinearProblem) -> set[int]:
        """Return K, N, and that of each segment."""
        return {problem.in_features, problem.out_features, *(segment.out_features for segment in problem.segments)}

    def words_of(self, code: str, problem: LinearProblem) -> set[str]:
        """Return the number of segments where a refusal is about them."""
        return {str(len(problem.segments))} if code == "segments" else set()

    def accepted(self) -> list[Hazard]:
        """
        Return the hazards that the kernel accepts on the platform.

        Where it needs uniform segments, it is asked about no others: the core would split such a layer. Problems whose
        permission to quantize x it leaves unused are those of the weights alone, and the first family will do, unless
        it refuses the weights alone.
        """
        uniform_only = self.kernel.traits.uniform_segments
        found: list[Hazard] = []
        unused = ""
        for hazard in CATALOGUE:
            verdict = self.kernel.supports(hazard.problem, self.platform)
            if not isinstance(verdict, Accepted) or (uniform_only and not hazard.problem.uniform):
                continue
            if hazard.problem.activation is not None and not verdict.quantizes_x and self._takes_alone(hazard.problem):
                unused = unused or hazard.family
                if hazard.family != unused:
                    continue
            found.append(hazard)
        return found

    def _takes_alone(self, problem: LinearProblem) -> bool:
        """Return whether the kernel accepts a problem's weights without the permission to quantize x."""
        return isinstance(self.kernel.supports(replace(problem, activation=None), self.platform), Accepted)

    def case(self, hazard: Hazard) -> Case:
        """Return the kernel prepared for a hazard."""
        return Case(self.kernel, self.platform, torch.device(self.device), hazard)


class Case:
    """A layer that is ready to run, and the oracle's view of it."""

    def __init__(self, kernel: LinearKernel, platform: Platform, device: torch.device, hazard: Hazard) -> None:
        verdict = kernel.supports(hazard.problem, platform)
        if not isinstance(verdict, Accepted):
            raise AssertionError(f"{kernel.name} accepted {hazard.name} before and now does not: {verdict}")
        self.kernel = kernel
        self.device = device
        self.hazard = hazard
        self.casts: tuple[Cast, ...] = verdict.casts
        self.quantizes_x = verdict.quantizes_x
        self.extra_bytes = verdict.extra_bytes
        bias = hazard.bias()
        self.bias = None if bias is None else bias.to(device)
        self.prepared = kernel.prepare(hazard.problem, hazard.weights(), hazard.activation(), device)

    def inputs(self, rows: int, seed: int = 0) -> torch.Tensor:
        """Return x `[rows, K]` on the device."""
        return self.hazard.inputs(rows, seed).to(self.device)

    def apply_plainly(self, x: torch.Tensor) -> torch.Tensor:
        """Run the kernel and nothing else, as a model does."""
        return self.kernel.apply(x, self.prepared, self.bias)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Run the kernel; shape, dtype and device of the result are checked, its values are not."""
        __tracebackhide__ = True
        y = self.apply_plainly(x)
        expected = (*x.shape[:-1], self.hazard.problem.out_features)
        if not isinstance(y, torch.Tensor) or tuple(y.shape) != expected:
            shape = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise AssertionError(f"x {list(x.shape)} gives y {shape}, not {list(expected)}")
        if y.dtype != x.dtype or y.device != x.device:
            raise AssertionError(f"y is {y.dtype} on {y.device}, not {x.dtype} on {x.device} as x is")
        return y

    def check(self, x: torch.Tensor, y: torch.Tensor, what: str) -> None:
        """Assert that y is the product of a finite x, quantized if that is declared, within the derived bound."""
        __tracebackhide__ = True
        rows = to_float64(x).reshape(-1, self.hazard.problem.in_features)
        bias = None if self.bias is None else to_float64(self.bias)
        operand: Floats | list[Quantized] = self._quantized(rows) if self.quantizes_x else rows
        bound = linear_bound(operand, oracle_segments(self.hazard), bias, self.hazard.problem.dtype, self.casts)
        if isinstance(operand, list):
            values = [segment.values() for segment in oracle_segments(self.hazard)]
            exact = fused_linear([each.values for each in operand], values, bias)
        else:
            exact = linear(operand, oracle_values(self.hazard), bias)
        assert_within(y.reshape(exact.shape), exact, bound, f"{what} [{self.hazard.name}]")

    def _quantized(self, rows: Floats) -> list[Quantized]:
        """Return what x becomes for each segment, each of which may have its own stored scale."""
        permission = self.hazard.problem.activation
        if permission is None:
            raise AssertionError(f"{self.kernel.name} quantizes x, which {self.hazard.name} does not permit")
        return [quantized(rows, permission, params) for params in self.hazard.activation()]

    def check_again(self, first: torch.Tensor, second: torch.Tensor, x: torch.Tensor, what: str) -> None:
        """Assert that two results for the same x are equal to the bit, or within the bound if that is not declared."""
        __tracebackhide__ = True
        if self.kernel.traits.deterministic:
            assert_bitwise_equal(second, first, f"{what} [{self.hazard.name}]")
        else:
            self.check(x, second, what)


@cache
def oracle_segments(hazard: Hazard) -> tuple[Segment, ...]:
    """Return the hazard's weights as plain numbers."""
    return tuple(segment_of(weight) for weight in hazard.weights())


@cache
def oracle_values(hazard: Hazard) -> Floats:
    """Return the hazard's exact values `[N, K]`."""
    return np.concatenate([segment.values() for segment in oracle_segments(hazard)])


def snapshot(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_unchanged(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor], who: str) -> None:
    """Assert that tensors still hold what a snapshot of them holds."""
    __tracebackhide__ = True
    for name, tensor in before.items():
        assert_bitwise_equal(now[name], tensor, f"{name} after {who}")
