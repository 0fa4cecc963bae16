"""Measuring kernels on a GPU, and a layer that changes its kernel with the number of rows: compiled, and in graphs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import quantplug
from quantplug.asking import ask
from quantplug.detect import detect
from quantplug.kernel import Accepted
from quantplug.plugins import registry
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.stopwatch import ceilings
from quantplug.timings import Measurement, Timings, problem_key, versions_of
from quantplug.trial import Workload

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.modules import QuantizedLinear

PATH = "model.layers.0.mlp.up_proj"
INT4 = WeightSpec(ElementType.INT4, PerGroup(128))


def test_every_kernel_that_accepts_is_right_and_timed(cuda: torch.device) -> None:
    """Each measured from a replayed graph; the dense product of each, too."""
    problem = LinearProblem(1024, (SegmentSpec(1536, INT4),), "bfloat16", bias=True)
    platform = detect(registry())
    with torch.inference_mode():
        work = Workload(problem, cuda, (1, 17, 300), 0.02)
        found = {}
        for name, provided in registry().kernels.items():
            verdict = ask(provided.item, problem, platform)
            if isinstance(verdict, Accepted) and provided.item.probe(platform) is None:
                found[name] = work.run(provided.item, verdict)
    assert {name: trial.wrong for name, trial in found.items() if trial.wrong} == {}
    assert len(found) > 1
    for trial in found.values():
        assert [rows for rows, _ in trial.us] == [1, 17, 300]
        assert all(0.5 < us < 1e6 for _, us in trial.us)


def test_ceilings_are_of_the_size_of_a_gpu(cuda: torch.device) -> None:
    found = ceilings(cuda, ["bfloat16"], seconds=0.05)
    assert 1e11 < found.read < 2e13
    assert 1e12 < found.flops["bfloat16"] < 1e16


@pytest.fixture
def layer(tmp_path: Path, cuda: torch.device) -> QuantizedLinear:
    """A layer that measured times give the CUDA C++ kernel up to 15 rows, and its dense product from there on."""
    if "marlin.wna16" not in registry().kernels:
        pytest.skip("quantplug-marlin is not installed")
    torch.manual_seed(0)
    save_file({f"{PATH}.weight": torch.randn(320, 576).to(torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    platform = detect(registry())
    problem = quantplug.plan(tmp_path, quantize="int4-g64", timings=Timings()).layer(PATH).problem
    assert problem is not None
    times = {"marlin.wna16": ((1, 5.0), (16, 50.0)), "marlin.wna16.dense": ((1, 20.0), (16, 21.0))}
    versions = versions_of("quantplug-marlin", platform, registry())
    timings = Timings(
        Measurement(platform.device, str(platform), problem_key(problem), name, versions, us)
        for name, us in times.items()
    )
    plan = quantplug.plan(tmp_path, quantize="int4-g64", timings=timings)
    assert [(c.kernel, c.max_rows) for c in plan.decisions[0].choices] == [
        ("marlin.wna16", 15),
        ("marlin.wna16.dense", None),
    ]
    return quantplug.load_layers(plan, tmp_path, device=cuda).modules[PATH]


def test_a_layer_with_two_kernels_is_captured_on_both_sides_of_the_boundary(layer: QuantizedLinear) -> None:
    values = layer.dequantize()
    for rows in (1, 15, 16, 200):
        x = torch.randn(rows, 576, dtype=torch.bfloat16, device="cuda")
        plain = layer(x)
        exact = x.to(torch.float32) @ values.t()
        assert float((plain.to(torch.float32) - exact).norm() / exact.norm()) < 2**-7
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x)), rows


def test_one_compiled_graph_serves_both_sides_of_the_boundary(layer: QuantizedLinear) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 15, 16, 200):
        x = torch.randn(rows, 576, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(compiled(x), layer(x)), rows
    assert len(graphs) == 1
