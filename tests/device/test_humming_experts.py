"""The humming kernel for experts against the conformance class, in a graph, on two streams and with many rows."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

pytest.importorskip("humming", reason="humming-kernels is not installed here", exc_type=ImportError)
pytest.importorskip("triton", reason="triton is not installed here")

from quantplug_humming.experts import HummingExperts
from quantplug_testkit.conformance.experts.case import ExpertCase

KERNEL = HummingExperts()
GPU = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
FAMILIES = {hazard.family: hazard for hazard in EXPERT_CATALOGUE if hazard.problem.dtype == "bfloat16"}
SOME = ("tiles-int4-group128", "tiles-mxfp8", "bias", "four-of-forty", "swigluoai")


class TestHummingExperts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


def case_of(family: str) -> ExpertCase:
    return ExpertCase(KERNEL, GPU, torch.device("cuda"), FAMILIES[family])


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("rows", [1, 70, 600])
def test_any_number_of_rows_is_within_the_bound(family: str, rows: int) -> None:
    case = case_of(family)
    x, routing = case.inputs(rows), case.route(rows)
    case.check(x, routing, case.apply(x, routing), f"{rows} rows")


@pytest.mark.parametrize("family", SOME)
def test_a_graph_follows_the_router(family: str) -> None:
    case = case_of(family)
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


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    """Each call has counters of its own, on which humming's parts of a sum wait for each other."""
    case = case_of("tiles-int4-group128")
    given = [(case.inputs(3, seed), case.route(3, seed=seed)) for seed in range(2)]
    for x, routing in given:
        case.apply(x, routing)
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(case.apply_plainly(*given[number]))
    torch.cuda.synchronize()
    for (x, routing), found in zip(given, results, strict=True):
        for y in found:
            case.check(x, routing, y, "beside another stream")
