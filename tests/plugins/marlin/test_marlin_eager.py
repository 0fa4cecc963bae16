"""Where a product goes through torch's operator: wherever somebody may see it. What goes past it needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.weight import Prepared, Weight
from quantplug_marlin import launch, mixture
from quantplug_marlin.kernel import MarlinKernel

KERNEL = MarlinKernel()
INT4 = WeightSpec(ElementType.INT4, PerGroup(128), "bfloat16")


def layer() -> Prepared:
    """A layer whose tensors have no values."""
    weight = Weight(torch.zeros(48, 256, dtype=torch.int8), torch.ones(48, 2, dtype=torch.bfloat16), INT4)
    problem = LinearProblem(256, (SegmentSpec(48, INT4),), "bfloat16")
    made = KERNEL.prepare(problem, [weight], [None], torch.device("cpu"))
    return Prepared(made.layout_id, problem, {name: each.to("meta") for name, each in made.tensors.items()}, made.meta)


def test_the_compiler_sees_the_operator():
    prepared, graphs = layer(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda given: KERNEL.apply(given, prepared, None), backend=backend, fullgraph=True)
    assert compiled(torch.empty(3, 256, dtype=torch.bfloat16, device="meta")).shape == (3, 48)
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [launch.linear]


def test_what_is_not_on_a_gpu_gets_the_operator():
    assert launch.linear_for(torch.empty(1, 8, device="meta"), None) is launch.linear
    assert launch.linear_for(torch.empty(1, 8), None) is launch.linear


def tangent_of(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    "differentiate",
    [
        tangent_of,
        lambda function, x: torch.func.jvp(function, (x,), (x,)),
        lambda function, x: torch.func.jacfwd(function)(x),
    ],
    ids=["dual", "jvp", "jacfwd"],
)
@pytest.mark.parametrize("what", ["x", "bias"])
def test_a_tangent_is_refused_not_lost(differentiate, what):
    prepared, fixed = layer(), torch.empty(2, 256, dtype=torch.bfloat16, device="meta")

    def function(given):
        return KERNEL.apply(*((given, prepared, None) if what == "x" else (fixed, prepared, given)))

    given = fixed if what == "x" else torch.empty(48, dtype=torch.bfloat16, device="meta")
    with pytest.raises(NotImplementedError, match="no derivatives for forward-mode differentiation"):
        differentiate(function, given)
    assert function(given).shape == (2, 48)


def test_what_carries_no_tangent_is_multiplied_beside_what_does():
    x = torch.empty(2, 256, dtype=torch.bfloat16, device="meta")
    assert tangent_of(lambda _: KERNEL.apply(x, layer(), None), torch.ones(3)).shape == (2, 48)


def test_experts_refuse_a_tangent():
    x = torch.ones(2, 64)
    with pytest.raises(NotImplementedError, match="no derivatives for forward-mode differentiation"):
        tangent_of(lambda given: mixture.apply(given, torch.ones(2, 1), torch.zeros(2, 1), None, None), x)
