"""
Hypothesis strategies for layers of experts, and for what a router says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import torch
from hypothesis import strategies as st

from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, FunctionName, MoEProblem
from quantplug_testkit.activation import make_activation
from quantplug_testkit.canonical import Scales, make_weight
from quantplug_testkit.strategies import DTYPES, inputs, permissions, seeds, sizes, weight_specs

if TYPE_CHECKING:
    from quantplug.spec import ActivationSpec, WeightSpec
    from quantplug.weight import Weight

_MOST_SLOTS = 4
_MODERATE: tuple[Scales, ...] = ("any", "some zero", "negative")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayer:
    """A problem with experts that fit it."""

    problem: MoEProblem
    experts: tuple[ExpertWeights, ...]


def functions() -> st.SearchStrategy[ExpertFunction]:
    """What may lie between the products, with limits that products reach or not."""
    return st.builds(
        ExpertFunction,
        name=st.sampled_from(get_args(FunctionName)),
        gated=st.booleans(),
        limit=st.none() | st.sampled_from((0.1, 1.0, 7.0)),
        alpha=st.sampled_from((1.0, 1.702)),
        up_offset=st.sampled_from((0.0, 1.0)),
    )


def expert_permissions() -> st.SearchStrategy[ActivationSpec | None]:
    """What files say about quantizing x, of which experts have a rule: not one dynamic scale for all rows."""
    return permissions().filter(lambda spec: spec is None or not spec.dynamic or spec.granularity != "tensor")


@st.composite
def expert_problems(draw: st.DrawFn, *, largest: int = 32, most_experts: int = 4) -> MoEProblem:
    """Problems of any size, whose projections share a format or not."""
    hidden, intermediate = draw(sizes(largest)), draw(sizes(largest))
    function = draw(functions())
    top_k = draw(st.integers(1, _MOST_SLOTS))
    gate = draw(_formats(hidden))
    up = gate if draw(st.booleans()) else draw(_formats(hidden))
    down = gate if draw(st.booleans()) else draw(_formats(intermediate))
    return MoEProblem(
        experts=draw(st.integers(1, most_experts)),
        top_k=top_k,
        hidden=hidden,
        intermediate=intermediate,
        w13=(gate, up) if function.gated else (gate,),
        w2=down,
        function=function,
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        activation=draw(expert_permissions()),
        router_weight_on_input=top_k == 1 and draw(st.booleans()),
    )


@st.composite
def expert_layers(draw: st.DrawFn, *, largest: int = 32, most_experts: int = 4) -> ExpertLayer:
    """Problems with experts."""
    problem = draw(expert_problems(largest=largest, most_experts=most_experts))
    return ExpertLayer(problem, tuple(draw(experts(problem)) for _ in range(problem.experts)))


@st.composite
def experts(draw: st.DrawFn, problem: MoEProblem) -> ExpertWeights:
    """One expert of a problem."""
    hidden, intermediate = problem.hidden, problem.intermediate
    first = tuple(draw(_weights(spec, intermediate, hidden)) for spec in problem.w13)
    second = draw(_weights(problem.w2, hidden, intermediate))
    made = ExpertWeights(
        first,
        second,
        a13=tuple(make_activation(problem.activation, draw(seeds())) for _ in first),
        a2=make_activation(problem.activation, draw(seeds())),
    )
    if not problem.bias:
        return made
    b13 = tuple(draw(moderate_inputs((intermediate,), problem.dtype)) for _ in first)
    return replace(made, b13=b13, b2=draw(moderate_inputs((hidden,), problem.dtype)))


@st.composite
def moderate_inputs(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Tensors as `inputs` draws them, none beyond 16: what two products and a square make of them fits into float16."""
    return draw(inputs(shape, dtype)).clamp(-16, 16)


@st.composite
def routings(draw: st.DrawFn, problem: MoEProblem, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    What a router says about a number of rows: weights float32 `[M, T]`, ids `[M, T]` and a map of all experts or None.

    Ids may be padding and may be repeated; with a map, experts may be elsewhere.
    """
    generator = draw(seeds())
    shape = (rows, problem.top_k)
    factors = torch.from_numpy(generator.standard_normal(shape)).float()
    if not draw(st.booleans()):
        ids = torch.from_numpy(generator.integers(-1, problem.experts, shape, endpoint=True))
        return factors, ids.to(draw(st.sampled_from((torch.int32, torch.int64)))), None
    everywhere = problem.experts + draw(st.integers(0, 3))
    order = torch.from_numpy(generator.permutation(everywhere))
    ids = torch.from_numpy(generator.integers(-1, everywhere, shape, endpoint=True))
    return factors, ids, torch.where(order < problem.experts, order, -1)


def _formats(in_features: int) -> st.SearchStrategy[WeightSpec]:
    """Numeric contracts; scales in float8_e4m3fn are near 1, and come with a global one, as in files."""
    return weight_specs(in_features).map(
        lambda spec: replace(spec, global_scale=spec.global_scale or spec.scale_dtype == "float8_e4m3fn")
    )


@st.composite
def _weights(draw: st.DrawFn, spec: WeightSpec, out_features: int, in_features: int) -> Weight:
    """Weights whose values two products in a row can hold."""
    kind: Scales = draw(st.sampled_from(_MODERATE))
    return make_weight(spec, out_features, in_features, draw(seeds()), scales=kind)
