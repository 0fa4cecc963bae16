"""The Triton kernel for experts against the conformance class, in a graph, on two streams and compiled, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance

pytest.importorskip("triton", reason="triton is not installed here")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_testkit.conformance.experts.case import ExpertCase  # after the question for a device
from quantplug_triton.experts import TritonExperts  # needs triton

KERNEL = TritonExperts()
GPU = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
FAMILIES = {hazard.family: hazard for hazard in EXPERT_CATALOGUE if hazard.problem.dtype == "bfloat16"}
SOME = ("tiles-int4-group128", "tiles-nvfp4", "act-order-bias", "four-of-forty", "swigluoai")


class TestTritonExperts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


def prepared(family: str) -> ExpertCase:
    return ExpertCase(KERNEL, GPU, torch.device("cuda"), FAMILIES[family])


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("rows", [1, 70, 600])
def test_any_number_of_rows_is_within_the_bound(family: str, rows: int) -> None:
    case = prepared(family)
    x, routing = case.inputs(rows), case.route(rows)
    case.check(x, routing, case.apply(x, routing), f"{rows} rows")


@pytest.mark.parametrize("family", SOME)
def test_a_graph_follows_the_router(family: str) -> None:
    case = prepared(family)
    x, routing = case.inputs(5), case.route(5)
    case.apply(x, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.apply_plainly(x, routing)
    for seed in (1, 2):
        other = case.route(5, seed=seed)
        for held, now in ((x, case.inputs(5, seed)), (routing.ids, other.ids), (routing.weights, other.weights)):
            held.copy_(now)
        graph.replay()
        case.check(x, routing, y, "replayed")
        assert_bitwise_equal(y, case.apply(x, routing), "the same without a graph")


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    case = prepared("tiles-int4-group128")
    given = [(case.inputs(3, seed), case.route(3, seed=seed)) for seed in range(2)]
    wanted = [case.apply(*each) for each in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(case.apply_plainly(*given[number]))
    torch.cuda.synchronize()
    for number, found in enumerate(results):
        assert all(torch.equal(y, wanted[number]) for y in found)


def test_the_compiler_sees_one_operator() -> None:
    case = prepared("act-order-bias")
    x, routing, made = case.inputs(3), case.route(3), case.prepared

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return KERNEL.apply(x, weights, ids, made)

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(x, routing.weights, routing.ids), case.apply(x, routing))


@pytest.mark.parametrize("experts", [1, 3, 40])
def test_choices_are_put_in_order_however_many_there_are(experts: int) -> None:
    """Routing counts in several goes from 1,024 choices on; rows of one expert fill many blocks."""
    case = prepared({1: "one-expert", 3: "all-of-three", 40: "four-of-forty"}[experts])
    for rows in (300, 2000):
        x, routing = case.inputs(rows), case.route(rows)
        case.check(x, routing, case.apply(x, routing), f"{rows} rows")
