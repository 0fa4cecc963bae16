"""
One layer of experts with weights that make a certain mistake show, and the maker of families of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch

from quantplug.activations import read_activation
from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.activation import make_activation
from quantplug_testkit.canonical import Scales, Zeros, make_weight
from quantplug_testkit.conformance.platforms import DTYPES
from quantplug_testkit.experts import expert_of
from quantplug_testkit.oracles.experts import Layer

if TYPE_CHECKING:
    from quantplug.spec import WeightSpec

# so that products lie where functions bend, and no result leaves float16
_REACH = 2.0


@dataclass(frozen=True, slots=True)
class ExpertHazard:
    """
    One layer of experts with weights that make a certain mistake show.

    Attributes:
        family: what can go wrong.
        problem: what the kernel is asked to run.
        zeros: which zero points the weights have, see `make_weight`.
        scales: which scales they have.
        reach: the standard deviation of first products, about.
        exact: whether scales are powers of two and a row of x is two small integers side by side, so that with a
            function such as relu nothing is rounded before the experts are added up.
    """

    family: str
    problem: MoEProblem
    zeros: Zeros = "any"
    scales: Scales = "any"
    reach: float = _REACH
    exact: bool = False

    @property
    def name(self) -> str:
        """The family and the dtype."""
        return f"{self.family}-{self.problem.dtype}"

    def expert(self, number: int, seed: int = 0) -> ExpertWeights:
        """Return one expert, fresh; the same for the same number and seed on every machine, and like no other."""
        problem, generator = self.problem, self.generator(seed, number)
        first = tuple(self.weight(spec, problem.intermediate, problem.hidden, generator) for spec in problem.w13)
        second = self.weight(problem.w2, problem.hidden, problem.intermediate, generator)
        stored = [make_activation(problem.activation, generator) for _ in range(len(first) + 1)]
        b13: tuple[torch.Tensor, ...] = ()
        b2 = None
        if problem.bias:
            b13 = tuple(self._normal((problem.intermediate,), generator) for _ in first)
            b2 = self._normal((problem.hidden,), generator)
        # h is about as large as first products are
        a13 = tuple(_stretched(params, _gain(self)) for params in stored[:-1])
        return ExpertWeights(first, second, b13, b2, a13, _stretched(stored[-1], self.reach))

    def inputs(self, rows: int, seed: int = 0) -> torch.Tensor:
        """Return x `[rows, H]` in the problem's dtype."""
        generator = self.generator(seed, 1_000_000)
        if not self.exact:
            return self._normal((rows, self.problem.hidden), generator, _gain(self))
        x = torch.zeros(rows, self.problem.hidden, dtype=getattr(torch, self.problem.dtype))
        places = torch.from_numpy(2 * generator.integers(0, self.problem.hidden // 2, rows))
        for offset in (0, 1):
            numbers = torch.from_numpy(generator.choice([-2.0, -1.0, 1.0, 2.0], rows))
            x[torch.arange(rows), places + offset] = numbers.to(x.dtype)
        return x

    def generator(self, *seeds: int) -> np.random.Generator:
        """Return a source of random numbers that depends on the hazard's name and the seeds."""
        return np.random.default_rng([crc32(self.name.encode()), *seeds])

    def weight(self, spec: WeightSpec, rows: int, columns: int, generator: np.random.Generator) -> Weight:
        """Return one projection `[rows, columns]`."""
        made = make_weight(spec, rows, columns, generator, zeros=self.zeros, scales=self.scales)
        if not self.exact:
            return made
        return replace(made, scales=torch.exp2(made.scales.float().log2().round()).to(made.scales.dtype))

    def _normal(self, shape: tuple[int, ...], generator: np.random.Generator, gain: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(gain * generator.standard_normal(shape)).to(getattr(torch, self.problem.dtype))


@cache
def oracle_layer(hazard: ExpertHazard, *, quantizes_x: bool) -> Layer:
    """Return the hazard's experts as plain numbers."""
    problem = hazard.problem
    return Layer(
        tuple(expert_of(hazard.expert(number)) for number in range(problem.experts)),
        problem.function,
        problem.activation if quantizes_x else None,
        problem.router_weight_on_input,
    )


@cache
def _gain(hazard: ExpertHazard) -> float:
    """The power of two that x, standard normal, is multiplied by for first products to reach as far as they should."""
    problem = hazard.problem
    like = hazard.weight(problem.w13[0], problem.intermediate, problem.hidden, hazard.generator(4_000_000))
    deviation = float(like.dequantize().square().sum(1).mean().sqrt())
    return float(2.0 ** np.round(np.log2(hazard.reach / deviation)))


def family(
    name: str,
    w13: WeightSpec | tuple[WeightSpec, ...],
    w2: WeightSpec | None = None,
    *,
    experts: int = 4,
    top_k: int = 2,
    hidden: int = 64,
    intermediate: int = 32,
    function: ExpertFunction | None = None,
    bias: bool = False,
    activation: str = "none",
    weight_on_input: bool = False,
    zeros: Zeros = "any",
    scales: Scales = "any",
    reach: float = _REACH,
    exact: bool = False,
) -> list[ExpertHazard]:
    """
    Return a family: one layer in every dtype.

    Args:
        name: what can go wrong.
        w13: numeric contract of gate and up, or of each.
        w2: that of down; None for the same.
        experts: E.
        top_k: T.
        hidden: H.
        intermediate: I.
        function: what lies between the products; None for silu, gated.
        bias: whether every projection has one.
        activation: what the file permits, as `quantplug.activations` spells it.
        weight_on_input: whether the router's weight multiplies x.
        zeros: kind of zero points, see `make_weight`.
        scales: kind of scales.
        reach: see `ExpertHazard`.
        exact: see `ExpertHazard`.
    """
    between = ExpertFunction() if function is None else function
    first = w13 if isinstance(w13, tuple) else (w13,) * (2 if between.gated else 1)
    return [
        ExpertHazard(
            name,
            MoEProblem(
                experts, top_k, hidden, intermediate, first, w2 or first[0], between, dtype, bias,
                read_activation(activation, name), weight_on_input,
            ),
            zeros, scales, reach, exact,
        )
        for dtype in DTYPES
    ]  # fmt: skip


def _stretched(params: ActivationParams | None, gain: float) -> ActivationParams | None:
    if params is None:
        return None
    scale, factor = (None if s is None else s * gain for s in (params.scale, params.global_scale))
    return ActivationParams(scale, params.zero, factor)
