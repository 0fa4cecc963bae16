"""
That no kernel reads or writes beside its tensors, through the interpreter: `tests.device.sanitize` asks a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.conformance.case import Case
from quantplug_testkit.conformance.experts import MoEKernelConformance
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.routing import scatter
from quantplug_testkit.conformance.hazard import family, weight
from quantplug_triton.experts import TritonExperts
from quantplug_triton.kernel import TritonKernel
from quantplug_triton.w8a8 import TritonQuantizedKernel

pytest.importorskip("triton", reason="triton is installed on Linux only")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here: see tests/device", allow_module_level=True)

import triton
import triton.language as tl
from triton_guarding import guarded  # needs triton

from quantplug_triton import expertlaunch, launch, w8a8launch  # need triton

GPU = Platform.parse("cuda:9.0")
CPU = torch.device("cpu")

ROWS = (1, 70)
"""In shares, and in the largest tiles."""


class Linear(LinearKernelConformance):
    kernel, platform, device = TritonKernel(), GPU, "cpu"


class Quantized(LinearKernelConformance):
    kernel, platform, device = TritonQuantizedKernel(), GPU, "cpu"


class Experts(MoEKernelConformance):
    kernel, platform, device = TritonExperts(), GPU, "cpu"


def covering(tests, name):
    """Return layers in which each aspect of a kernel's catalogue occurs."""
    return [pytest.param(hazard, id=hazard.name) for (hazard,) in tests().given((name,), whole=False)]


@pytest.fixture(autouse=True)
def _many_multiprocessors(monkeypatch):
    """As many as an H100 has, so that few rows are shared between programs as they are there."""
    for module in (launch, w8a8launch, expertlaunch):
        monkeypatch.setattr(module, "processors", lambda index: 132)


@triton.jit
def copy(from_ptr, to_ptr, count, more, block: tl.constexpr):
    places = tl.arange(0, block)
    tl.store(to_ptr + places, tl.load(from_ptr + places + more, mask=places < count, other=0.0), mask=places < count)


def test_what_is_behind_a_tensor_is_seen():
    given, made = torch.ones(30), torch.zeros(30)
    with guarded():
        copy[(1,)](given, made, 30, 0, block=32)
    assert torch.equal(given, made)
    for count, more, what in ((30, 1, "load"), (30, -1, "load"), (30, 10**5, "load"), (31, -1, "load")):
        with guarded(), pytest.raises(triton.runtime.errors.InterpreterError, match=f"{what}: .* lie in no tensor"):
            copy[(1,)](given, made, count, more, block=32)
    with guarded(), pytest.raises(triton.runtime.errors.InterpreterError, match="store: 1 of 31"):
        copy[(1,)](torch.ones(31), made, 31, 0, block=32)
    with guarded(), pytest.raises(triton.runtime.errors.InterpreterError, match="load: 2 of 30"):
        copy[(1,)](torch.ones(40)[5:33], made, 30, 0, block=32)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hazard", covering(Experts, "form"))
def test_experts_stay_within_their_tensors(hazard, rows):
    case = ExpertCase(TritonExperts(), GPU, CPU, hazard)
    x, routing = case.inputs(rows), scatter(hazard, case.route(rows, "mixed"))
    with guarded() as launched:
        case.apply(x, routing)
    assert launched == ["route", "gate_and_up", "down", "combine"]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hazard", covering(Linear, "family"))
def test_a_product_stays_within_its_tensors(hazard, rows):
    case = Case(TritonKernel(), GPU, CPU, hazard)
    with guarded() as launched:
        case.apply(case.inputs(rows))
    assert "multiply" in launched


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hazard", covering(Quantized, "family"))
def test_a_product_of_a_quantized_x_stays_within_its_tensors(hazard, rows):
    case = Case(TritonQuantizedKernel(), GPU, CPU, hazard)
    with guarded() as launched:
        case.apply(case.inputs(rows))
    assert "multiply_quantized" in launched


@pytest.mark.parametrize("outputs", [130, 192])
def test_a_tile_of_two_columns_of_blocks_may_find_one(outputs):
    """128 outputs to a tile from 65 rows on, and 64 to what is stored: no layer of the catalogue has an odd number."""
    hazard = family("odd-column-blocks", outputs, 64, weight("int4", 32))[0]
    case = Case(TritonKernel(), GPU, CPU, hazard)
    x = case.inputs(70)
    with guarded():
        y = case.apply(x)
    case.check(x, y, "70 rows")
