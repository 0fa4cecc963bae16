"""
The Triton kernel for a quantized x on the catalogue of hazards, element by element, through the interpreter.

Codes are multiplied in float32 here, and rounded by the arithmetic that GPUs without FP8 use. On a machine with a GPU
tests/device does the same, and more, on the GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug.spec import ElementType
from quantplug.weight import ActivationParams
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.conformance.case import Case
from quantplug_testkit.conformance.problems import CATALOGUE, Hazard
from quantplug_testkit.oracles import floats
from quantplug_triton.grids import GRIDS
from quantplug_triton.w8a8 import TritonQuantizedKernel

pytest.importorskip("triton", reason="triton is installed on Linux only")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here: see tests/device", allow_module_level=True)

import triton
import triton.language as tl

from quantplug_triton import quantizelaunch, w8a8launch  # need triton
from quantplug_triton.w8a8device import operand  # needs triton

KERNEL = TritonQuantizedKernel()
GPU = Platform.parse("cuda:9.0")
ACCEPTED = [
    hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
]
FAMILIES = {hazard.family: hazard for hazard in ACCEPTED}
"""The last hazard of each family: the one in float32."""

OF_EACH_KIND = (
    "x-int8-bias-odd-n-and-k", "x-int8-groups", "x-float8-static-fused", "x-float8-bias-odd-n-and-k",
    "x-float8-ragged-groups-and-blocks", "x-mxfp8-short-last-group", "x-mxfp8-mxfp4", "x-mxfp4",
)  # fmt: skip
"""Every type of x, and everything that may share a scale, but one scale of all of x."""


def prepared(hazard: Hazard) -> Case:
    return Case(KERNEL, GPU, torch.device("cpu"), hazard)


def test_the_catalogue_has_every_kind():
    assert set(FAMILIES) == {
        "x-int8", "x-int8-tiles", "x-int8-bias-odd-n-and-k", "x-int8-one-input", "x-int8-long-sum", "x-int8-one-scale",
        "x-int8-int4-groups", "x-int8-for-all-of-x", "x-int8-groups", "x-int8-static", "x-int8-fused",
        "x-float8", "x-float8-tiles", "x-float8-bias-odd-n-and-k", "x-float8-one-input", "x-float8-int4-groups",
        "x-float8_e5m2", "x-float8-groups-and-blocks", "x-float8-ragged-groups-and-blocks", "x-float8-static",
        "x-float8-static-fused", "x-mxfp8", "x-mxfp8-short-last-group", "x-mxfp4", "x-mxfp8-mxfp4",
    }  # fmt: skip


@pytest.mark.parametrize("hazard", ACCEPTED, ids=lambda hazard: hazard.name)
def test_every_element_is_within_the_derived_bound(hazard):
    """Quantized within the product: rows are few."""
    case = prepared(hazard)
    for rows in (0, 1, 3):
        x = case.inputs(rows)
        before = x.clone()
        case.check(x, case.apply(x), f"{rows} rows")
        assert torch.equal(x, before)


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_a_launch_before_the_product_quantizes_alike(hazard, monkeypatch):
    case = prepared(hazard)
    x = case.inputs(3)
    within = case.apply(x)
    monkeypatch.setattr(w8a8launch, "_FUSED_ROWS", 0)
    assert torch.equal(case.apply(x), within)


@pytest.mark.parametrize("rows", [17, 65])
@pytest.mark.parametrize("family", ["x-float8-bias-odd-n-and-k", "x-mxfp8-mxfp4", "x-int8-static"])
def test_more_rows_take_other_tiles(family, rows):
    case = prepared(FAMILIES[family])
    x = case.inputs(rows)
    case.check(x, case.apply(x), f"{rows} rows")


@pytest.mark.parametrize(
    ("rows", "outputs", "large", "wanted"),
    [
        (1, 4096, True, (16, 128, 4, 4, 8)),
        (1, 28672, True, (16, 128, 4, 4, 1)),
        (64, 4096, True, (64, 64, 4, 4, 4)),
        (128, 4096, True, (128, 64, 4, 4, 4)),
        (2048, 4096, True, (128, 128, 8, 4, 1)),
        (2048, 4096, False, (64, 128, 4, 3, 1)),
    ],
)
def test_a_product_is_cut_to_what_132_multiprocessors_hold(rows, outputs, large, wanted):
    assert w8a8launch.cut(rows, outputs, 32, 132, large=large) == wanted


def test_every_tile_is_computed_whatever_the_order():
    """More tiles than go abreast, the last of them alone, and several rows of tiles."""
    weight = replace(FAMILIES["x-float8"].problem.segments[0], out_features=9 * 128 + 5)
    hazard = replace(FAMILIES["x-float8"], problem=replace(FAMILIES["x-float8"].problem, segments=(weight,)))
    case = prepared(hazard)
    x = case.inputs(130)
    case.check(x, case.apply(x), "130 rows")


@pytest.mark.slow
def test_the_compiler_sees_one_operator():
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = KERNEL, GPU
    tests.test_compiles_into_one_graph(FAMILIES["x-float8-static-fused"])


def test_long_rows_are_quantized_in_pieces(monkeypatch):
    """Within the product, and before it."""
    monkeypatch.setattr(quantizelaunch, "_WIDEST", 64)
    case = prepared(FAMILIES["x-float8-tiles"])
    x = case.inputs(2)
    case.check(x, case.apply(x), "within")
    monkeypatch.setattr(w8a8launch, "_FUSED_ROWS", 0)
    case.check(x, case.apply(x), "before")


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_odd_inputs_are_taken_as_the_conformance_class_asks(name):
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = KERNEL, GPU
    tests.test_small_and_large_inputs_are_within_the_bound(FAMILIES[name])
    case = prepared(FAMILIES[name])
    y = case.apply(torch.zeros_like(case.inputs(2)))
    assert torch.equal(y, torch.zeros_like(y) if case.bias is None else case.bias.expand_as(y))


@pytest.mark.parametrize("name", ["x-float8-bias-odd-n-and-k", "x-mxfp8-mxfp4", "x-int8-static"])
@pytest.mark.parametrize("before", [False, True], ids=["within", "before"])
def test_strided_and_three_dimensional_inputs_are_read_where_they_lie(name, before, monkeypatch):
    if before:
        monkeypatch.setattr(w8a8launch, "_FUSED_ROWS", 0)
    case = prepared(FAMILIES[name])
    x = case.inputs(4)
    wide = torch.full((4, 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    assert torch.equal(case.apply(wide[:, ::2]), case.apply(x))
    assert torch.equal(case.apply(x.view(2, 2, -1)), case.apply(x).view(2, 2, -1))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's own, of the interpreter
@pytest.mark.parametrize("name", OF_EACH_KIND)
@pytest.mark.parametrize("before", [False, True], ids=["within", "before"])
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(name, before, monkeypatch):
    if before:
        monkeypatch.setattr(w8a8launch, "_FUSED_ROWS", 0)
    case = prepared(FAMILIES[name])
    clean = case.inputs(5)
    x = clean.clone()
    x[1, -1], x[3, 0] = float("nan"), float("inf")
    y, without = case.apply(x), case.apply(clean)
    assert torch.equal(y[[0, 2, 4]], without[[0, 2, 4]])
    assert y[1].isnan().all()
    if case.hazard.problem.activation.dynamic:
        assert not y[3].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_scale_for_all_of_x_carries_nan():
    case = prepared(FAMILIES["x-int8-for-all-of-x"])
    for odd in (float("nan"), float("inf")):
        x = case.inputs(3)
        x[1, 7] = odd
        assert not case.apply(x).isfinite().any()


@pytest.mark.parametrize("element", GRIDS)
def test_rounding_gives_the_nearest_code_everywhere(element):
    """Every code, every middle between two, and the float32 numbers beside both; with ties to even, and saturating."""
    if element is ElementType.INT8:
        codes = np.arange(-130.0, 131.0)
    else:
        codes = floats.values(element)
        codes = np.unique(codes[np.isfinite(codes)])
    exact = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, codes * 1.5, 0.25 * codes]).astype(np.float32)
    quotients = np.concatenate(
        [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, -np.float32(np.inf))]
    )
    x = torch.from_numpy(quotients)[None]
    grid, held = GRIDS[element], quantizelaunch.held_in(element, native=False)
    width = -(-x.shape[1] // 128) * 128
    found, _ = quantizelaunch.quantize(x, torch.ones(1), width, 128, held, "tensor", grid)
    if element is ElementType.INT8:
        wanted = np.clip(np.rint(quotients.astype(np.float64)), -128, 127)
    else:
        wanted = floats.decode(floats.encode(quotients.astype(np.float64), element), element)
    assert np.array_equal(found[0, : len(quotients)].numpy().astype(np.float64), wanted)


@triton.jit
def as_float8(octets_ptr, values_ptr, kind: tl.constexpr, middle: tl.constexpr, count: tl.constexpr):
    """Decode both halves of each byte, as products of FP8 do, which the interpreter does not have."""
    octets = tl.load(octets_ptr + tl.arange(0, count))
    for field in tl.static_range(2):
        values = operand(octets, field, kind, 4, middle, tl.float8e4nv)
        tl.store(values_ptr + field * count + tl.arange(0, count), values)


@pytest.mark.parametrize(
    ("kind", "middle", "wanted"),
    [(4, 0, floats.values("float4_e2m1fn")), (1, 8, np.arange(16.0) - 8)],
    ids=["float4_e2m1fn", "int4"],
)
def test_every_code_of_four_bits_becomes_the_same_number_in_fp8(kind, middle, wanted):
    codes = torch.arange(16, dtype=torch.uint8)
    values = torch.empty(32, dtype=torch.float8_e4m3fn)
    as_float8[(1,)](codes | (codes.flip(0) << 4), values, kind, middle, 16)
    assert np.array_equal(values.to(torch.float64).numpy(), np.concatenate([wanted, wanted[::-1]]))


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_the_way_back_gives_every_bit_again(hazard):
    case = prepared(hazard)
    for found, given in zip(KERNEL.unprepare(case.prepared), hazard.weights(), strict=True):
        assert torch.equal(found.codes.contiguous().view(torch.uint8), given.codes.contiguous().view(torch.uint8))
        assert found.scales.dtype == given.scales.dtype
        assert torch.equal(found.scales.contiguous().view(torch.uint8), given.scales.contiguous().view(torch.uint8))
    values = torch.cat([weight.dequantize() for weight in hazard.weights()])
    assert torch.equal(KERNEL.dequantize(case.prepared, torch.float32), values)


def test_there_is_no_way_back_from_a_rounded_scale():
    hazard = FAMILIES["x-float8"]
    weights = [replace(weight, scales=weight.scales.to(torch.float64) / 3) for weight in hazard.weights()]
    made = KERNEL.prepare(hazard.problem, weights, hazard.activation(), torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="float64"):
        KERNEL.unprepare(made)


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_what_is_held_is_no_more_than_is_declared(hazard):
    """The file's own bytes, and those that the verdict declares beside them."""
    held = prepared(hazard)
    entitled = 0
    for weight in hazard.weights():
        entitled += -(-weight.codes.numel() * weight.spec.element.bits // 8) + weight.scales.nbytes
    assert held.prepared.nbytes <= entitled + held.extra_bytes


@pytest.mark.parametrize("family", ["x-float8-static-fused", "x-mxfp8-mxfp4", "x-int8-fused"])
def test_a_second_preparation_writes_into_the_same_memory(family):
    hazard = FAMILIES[family]
    case = prepared(hazard)
    places = {name: tensor.data_ptr() for name, tensor in case.prepared.tensors.items()}
    other = (hazard.weights(seed=1), hazard.activation(seed=1), torch.device("cpu"))
    again = KERNEL.prepare(hazard.problem, *other, out=case.prepared)
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == places
    fresh = KERNEL.prepare(hazard.problem, *other)
    for name, tensor in fresh.tensors.items():
        assert torch.equal(again.tensors[name].float(), tensor.float()), name


def test_segments_with_one_stored_scale_of_x_share_a_product():
    hazard = FAMILIES["x-float8-static-fused"]
    weights, device = hazard.weights(), torch.device("cpu")
    one, two = (ActivationParams(torch.tensor(scale)) for scale in (0.004, 0.005))
    shared = KERNEL.prepare(hazard.problem, weights, [one, one], device)
    apart = KERNEL.prepare(hazard.problem, weights, [one, two], device)
    assert (shared.meta["parts"], apart.meta["parts"]) == (1, 2)
    x = hazard.inputs(3)
    assert torch.equal(KERNEL.apply(x, shared, None)[:, :64], KERNEL.apply(x, apart, None)[:, :64])
    with pytest.raises(ValueError, match=r"codes\.1, .*, not codes\.0, .* as before"):
        KERNEL.prepare(hazard.problem, weights, [one, two], device, out=shared)
    with pytest.raises(ValueError, match="a stored scale of x is missing"):
        KERNEL.prepare(hazard.problem, weights, [one, None], device)


@pytest.mark.parametrize(
    ("shared", "rows", "row_bytes", "tiles", "shares", "within"),
    [
        ("token", 1, 8192, 64, 8, True),
        ("token", 2, 8192, 64, 8, False),  # 8 MB of rows that are read once more
        ("group", 2, 8192, 64, 8, True),
        ("tensor", 16, 8192, 32, 8, True),
        ("power", 16, 8192, 448, 1, False),
        ("tensor", 17, 256, 1, 1, False),  # more than a tile
    ],
)
def test_x_is_quantized_within_the_product_where_that_reads_little(shared, rows, row_bytes, tiles, shares, within):
    assert w8a8launch.is_fused(shared, rows, row_bytes, tiles, shares) is within
