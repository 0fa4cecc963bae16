"""The CUDA C++ kernel for experts against the conformance class, in a graph and with many rows, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_marlin import mixture
from quantplug_marlin.experts import MarlinExperts
from quantplug_testkit.conformance.experts.case import ExpertCase

KERNEL = MarlinExperts()
GPU = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
FAMILIES = {h.family: h for h in EXPERT_CATALOGUE if h.problem.dtype == "bfloat16"}
SOME = ("tiles-int4-group128", "tiles-mxfp8", "bias", "four-of-forty", "swigluoai")


class TestMarlinExperts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("rows", [1, 70, 600])
def test_any_number_of_rows_is_within_the_bound(family: str, rows: int) -> None:
    case = ExpertCase(KERNEL, GPU, torch.device("cuda"), FAMILIES[family])
    x, routing = case.inputs(rows), case.route(rows)
    case.check(x, routing, case.apply(x, routing), f"{rows} rows")


@pytest.mark.parametrize("family", SOME)
def test_a_graph_follows_the_router(family: str) -> None:
    case = ExpertCase(KERNEL, GPU, torch.device("cuda"), FAMILIES[family])
    x, routing = case.inputs(5), case.route(5)
    case.apply(x, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.apply_plainly(x, routing)
    for seed in (1, 2):
        x.copy_(case.inputs(5, seed))
        other = case.route(5, seed=seed)
        routing.ids.copy_(other.ids)
        routing.weights.copy_(other.weights)
        graph.replay()
        case.check(x, routing, y, "replayed")
        assert_bitwise_equal(y, case.apply(x, routing), "the same without a graph")


@pytest.mark.parametrize("family", ["tiles-int4-group128", "bias", "mxfp8"])
def test_the_operator_keeps_torchs_rules(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls, operator = ExpertCase(KERNEL, GPU, torch.device("cuda"), FAMILIES[family]), [], mixture.experts
    monkeypatch.setattr(mixture, "experts", lambda *given: calls.append(given) or operator(*given))
    case.apply(case.inputs(3), case.route(3))
    torch.library.opcheck(operator, calls[0])
