"""Layers of several formats from file to product through the Triton kernel, compiled and in a replayed graph."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import quantplug
from quantplug.plugins import registry
from quantplug.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.modules import QuantizedLinear

PATH = "model.layers.0.mlp.up_proj"
PIN = Policy.parse({"rule": [{"pin": "triton.wna16"}]}, "test")
RECIPES = ("int4-g64", "uint4-g32", "int8", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4")


def layer(directory: Path, recipe: str, cuda: torch.device) -> tuple[QuantizedLinear, torch.Tensor]:
    """Return a layer quantized on load, and its values in float32."""
    torch.manual_seed(0)
    save_file({f"{PATH}.weight": torch.randn(320, 576).to(torch.bfloat16)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    plan = quantplug.plan(directory, quantize=recipe, policy=PIN)
    found = quantplug.load_layers(plan, directory, device=cuda).modules[PATH]
    return found, found.dequantize()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_graph_gives_what_plain_calls_give_also_for_other_inputs(
    tmp_path: Path, cuda: torch.device, recipe: str
) -> None:
    if recipe not in registry().recipes:
        pytest.skip(f"no installed plugin offers {recipe}")
    module, values = layer(tmp_path, recipe, cuda)
    for rows in (1, 17):
        x = torch.randn(rows, 576, dtype=torch.bfloat16, device=cuda)
        plain = module(x)
        exact = x.to(torch.float32) @ values.t()
        assert float((plain.to(torch.float32) - exact).norm() / exact.norm()) < 2**-8
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, module(x))


def test_two_streams_at_once_do_not_disturb_each_other(tmp_path: Path, cuda: torch.device) -> None:
    if "int4-g64" not in registry().recipes:
        pytest.skip("no installed plugin offers int4-g64")
    module, _ = layer(tmp_path, "int4-g64", cuda)
    inputs = [torch.randn(1, 576, dtype=torch.bfloat16, device=cuda) for _ in range(2)]
    wanted = [module(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(module(inputs[number]))
    torch.cuda.synchronize()
    for number, found in enumerate(results):
        assert all(torch.equal(y, wanted[number]) for y in found)


def test_the_compiler_sees_one_operator(tmp_path: Path, cuda: torch.device) -> None:
    if "int4-g64" not in registry().recipes:
        pytest.skip("no installed plugin offers int4-g64")
    module, _ = layer(tmp_path, "int4-g64", cuda)
    x = torch.randn(3, 576, dtype=torch.bfloat16, device=cuda)
    assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))
