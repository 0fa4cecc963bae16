"""Where a product goes through torch's operator: wherever somebody may see it. What goes past it needs a GPU."""

from __future__ import annotations

import torch

from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.weight import Prepared, Weight
from quantplug_marlin import launch
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
