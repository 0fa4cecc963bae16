"""`tune` and `bench` on a GPU: what was measured is kept, decides, and decides alike in every process of a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import quantplug
from quantplug.benching import bench, cases_of_recipes
from quantplug.benchreport import DENSE
from quantplug.kernel import Accepted
from quantplug.timingstore import VARIABLE
from quantplug.tuning import tune

if TYPE_CHECKING:
    from pathlib import Path

PATH = "model.layers.0.mlp.up_proj"
RECIPE = "int4-g64"
ROWS = (1, 16, 64, 512)

CHOICES = """
import sys, quantplug
plan = quantplug.plan(sys.argv[1], quantize=sys.argv[2])
print(plan.hash, plan.decisions[0].basis, *((c.kernel, c.max_rows) for c in plan.decisions[0].choices))
"""


@pytest.fixture
def checkpoint(tmp_path: Path, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of one dense layer, and a file of its own for measured times."""
    torch.manual_seed(0)
    save_file({f"{PATH}.weight": torch.randn(1024, 2048).to(torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "timings.json"))
    return tmp_path


def test_what_was_tuned_decides_in_every_process_and_in_graphs(checkpoint: Path) -> None:
    """The plan says "measured"; each rank of a job makes the same one; a captured layer changes kernels by rows."""
    report = tune(checkpoint, quantize=RECIPE, rows=ROWS, seconds=0.02)
    (tuned,) = report.problems
    assert (tuned.before.basis, tuned.after.basis) == ("estimated", "measured")
    assert {each.kernel: each.wrong for each in tuned.measurements if each.wrong} == {}
    accepted = {c.kernel for c in tuned.before.candidates if isinstance(c.verdict, Accepted)}
    measured = {each.kernel: dict(each.us) for each in tuned.measurements}
    assert set(measured) == accepted - {"reference"}
    assert all(tuple(times) == ROWS for times in measured.values())

    plan = quantplug.plan(checkpoint, quantize=RECIPE)
    assert plan.decisions[0].basis == "measured"
    command = [sys.executable, "-c", CHOICES, str(checkpoint), RECIPE]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RANK": str(rank)})
        for rank in range(2)
    ]
    said = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert len(said) == 1
    assert said.pop().startswith(f"{plan.hash} measured ")

    layer = quantplug.load_layers(plan, checkpoint, device="cuda").modules[PATH]
    values = layer.dequantize()
    for rows in (*ROWS, 8, 15, 40, 300, 4096):
        x = torch.randn(rows, 2048, dtype=torch.bfloat16, device="cuda")
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        exact = x.to(torch.float32) @ values.t()
        assert float((y.to(torch.float32) - exact).norm() / exact.norm()) < 2**-7, rows


def test_bench_measures_kernels_beside_the_dense_product(cuda: torch.device) -> None:
    cases = cases_of_recipes(["int4-g128"], [(2048, 2048)], "bfloat16")
    report = bench(cases, rows=(1, 64), kernels=["*.wna16", "reference"], seconds=0.02)
    assert report.failures == ()
    assert {point.kernel for point in report.points} > {DENSE, "reference"}
    assert 1e11 < report.read < 2e13
    for point in report.points:
        assert 0 < point.of_read < 2
        assert 0 < point.of_flops < 1.1
        assert point.of_dense > 0
        assert point.of_dense == 1 or point.kernel != DENSE
