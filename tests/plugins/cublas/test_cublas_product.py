"""
Products of the cuBLAS kernel on the catalogue of hazards, element by element, by torch's scaled product on the CPU.

x is quantized through Triton's interpreter and by plain operators. torch has no product of blocks on the CPU, so that
one is done in float64 here. On a machine with a GPU tests/device does all of it, and more.
"""

from __future__ import annotations

import os

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug_cublas import product
from quantplug_cublas.kernel import CublasKernel, FastCublasKernel
from quantplug_testkit.conformance.case import Case
from quantplug_testkit.conformance.problems import CATALOGUE, Hazard

KERNEL = CublasKernel()
GPU = Platform.parse("cuda:9.0")
ACCEPTED = [
    hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
]
FAMILIES = {hazard.family: hazard for hazard in ACCEPTED}
"""The last hazard of each family: the one in float32."""

scaled_mm = torch._scaled_mm


def spread(scales: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    """Scales of tiles for each element of `[rows, inputs]`."""
    tall = scales.repeat_interleave(1 if scales.shape[0] == rows else 128, 0)[:rows]
    return tall.repeat_interleave(128, 1)[:, :inputs].double()


def with_blocks(a, b, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=True):
    """The scaled product of torch, and that of blocks as cuBLAS wants it, which refuses what cuBLAS refuses."""
    assert not use_fast_accum
    if scale_b.shape[0] == 1 or scale_b.dim() < 2:
        return scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype)
    (rows, inputs), outputs = a.shape, b.shape[1]
    assert rows % 4 == 0
    assert inputs % 512 == 0
    assert outputs % 16 == 0
    assert (scale_a.stride(), scale_b.stride(0)) == ((1, rows), 1)
    weight = b.t().double() * spread(scale_b.t(), outputs, inputs)
    y = a.double() * spread(scale_a, rows, inputs) @ weight.t()
    return (y if bias is None else y + bias.double()).to(out_dtype)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", with_blocks)


@pytest.fixture(params=["interpreter", "plain"])
def ways(request, monkeypatch):
    """Both ways to quantize x."""
    if request.param == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here: see tests/device")
    monkeypatch.setattr(product, "_LAUNCHES", product._LAUNCHES and request.param == "interpreter")


def prepared(hazard: Hazard) -> Case:
    return Case(KERNEL, GPU, torch.device("cpu"), hazard)


def test_the_catalogue_has_every_mode():
    assert set(FAMILIES) == {
        "x-float8-static", "x-float8", "x-float8-tiles", "x-float8-bias-odd-n-and-k", "x-float8-one-input",
        "x-float8_e5m2", "x-float8-groups-and-blocks", "x-float8-ragged-groups-and-blocks", "x-float8-static-fused",
    }  # fmt: skip


@pytest.mark.parametrize("hazard", ACCEPTED, ids=lambda hazard: hazard.name)
def test_every_element_is_within_the_derived_bound(hazard, ways):
    case = prepared(hazard)
    for rows in (0, 1, 3):
        x = case.inputs(rows)
        before = x.clone()
        case.check(x, case.apply(x), f"{rows} rows")
        assert torch.equal(x, before)


@pytest.mark.parametrize("family", ["x-float8-bias-odd-n-and-k", "x-float8-static-fused", "x-float8"])
def test_many_elements_are_multiplied_with_their_scales_at_once(family, monkeypatch):
    """Both ways to apply scales per token and row."""
    monkeypatch.setattr(product, "_LAUNCHES", False)
    monkeypatch.setattr(product, "_FEW_SUMS", 0)
    for hazard in (hazard for hazard in ACCEPTED if hazard.family == family):
        case = prepared(hazard)
        for rows in (1, 5):
            x = case.inputs(rows)
            case.check(x, case.apply(x), f"{rows} rows")


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_sums_are_added_up_fast_where_that_is_asked_for(few, monkeypatch):
    """In both ways to apply scales; torch adds them up alike on the CPU."""
    monkeypatch.setattr(product, "_FEW_SUMS", few)
    asked = []

    def fast_product(*args, use_fast_accum, **options):
        asked.append(use_fast_accum)
        return with_blocks(*args, use_fast_accum=False, **options)

    monkeypatch.setattr(torch, "_scaled_mm", fast_product)
    for kernel in (FastCublasKernel(), KERNEL):
        case = Case(kernel, GPU, torch.device("cpu"), FAMILIES["x-float8"])
        x = case.inputs(3)
        case.check(x, case.apply(x), "3 rows")
    assert asked == [True, False]


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_the_way_back_gives_every_bit_again(hazard):
    case = prepared(hazard)
    for found, given in zip(KERNEL.unprepare(case.prepared), hazard.weights(), strict=True):
        assert torch.equal(found.codes.view(torch.uint8), given.codes.view(torch.uint8))
        assert found.scales.dtype == given.scales.dtype
        assert torch.equal(found.scales, given.scales)
    values = torch.cat([weight.dequantize() for weight in hazard.weights()])
    assert torch.equal(KERNEL.dequantize(case.prepared, torch.float32), values)


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_what_is_held_is_no_more_than_is_declared(hazard):
    """The file's own bytes, and those that the verdict declares beside them."""
    held = prepared(hazard)
    entitled = sum(weight.codes.nbytes + weight.scales.nbytes for weight in hazard.weights())
    assert held.prepared.nbytes <= entitled + held.extra_bytes


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_a_second_preparation_writes_into_the_same_memory(hazard):
    case = prepared(hazard)
    places = {name: tensor.data_ptr() for name, tensor in case.prepared.tensors.items()}
    other = (hazard.weights(seed=1), hazard.activation(seed=1), torch.device("cpu"))
    again = KERNEL.prepare(hazard.problem, *other, out=case.prepared)
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == places
    fresh = KERNEL.prepare(hazard.problem, *other)
    for name, tensor in fresh.tensors.items():
        assert torch.equal(again.tensors[name].float(), tensor.float()), name
