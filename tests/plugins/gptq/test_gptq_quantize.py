"""
Quantizing: contracts that always hold, the algorithm worked by hand, and that a Hessian is worth its while.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import ConvertError
from quantplug_gptq import solver
from quantplug_gptq.rounding import Grid, round_to_nearest, search_parameters
from quantplug_gptq.scheme import GPTQScheme
from quantplug_gptq.solver import solve


def calibrated(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and the Hessian of correlated inputs of very different sizes, two of them never active."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    inputs *= torch.rand(k, generator=generator) * 3
    inputs[:, [3, k // 2]] = 0
    return torch.randn(n, k, generator=generator) * 0.02, inputs.t() @ inputs


def output_error(dense: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return the squared change of the outputs on the calibration inputs, in float64."""
    difference = (values.double() - dense.double()) @ torch.linalg.cholesky(
        hessian.double() + 1e-9 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    )
    return float(difference.square().sum())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    group_size=st.sampled_from((-1, 16, 32, 50)),
    sym=st.booleans(),
    desc_act=st.booleans(),
    checkpoint_format=st.sampled_from(("gptq", "gptq_v2")),
    hessian=st.booleans(),
    n=st.integers(1, 20),
    k=st.integers(8, 90),
)
def test_what_is_quantized_can_be_stored_and_read_back(
    bits, group_size, sym, desc_act, checkpoint_format, hessian, n, k
):
    """Codes in range, scales that bfloat16 holds exactly, version 1 zero points from 1, and the same after the file."""
    scheme = GPTQScheme(bits, group_size, sym, desc_act, checkpoint_format)
    dense, inputs = calibrated(n, k)
    weight = scheme.quantize(dense, hessian=inputs if hessian else None)
    assert weight.scales.dtype == torch.float16
    assert torch.equal(weight.scales.to(torch.bfloat16).to(torch.float16), weight.scales)
    assert bool((weight.scales > 0).all())
    if weight.zeros is not None and checkpoint_format == "gptq":
        assert int(weight.zeros.min()) >= 1
    stored = scheme.encode(weight)
    shape = scheme.shape_of({suffix: tuple(tensor.shape) for suffix, tensor in stored.items()}, "layer")
    again = scheme.decode(stored, shape, "layer")
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.spec == weight.spec
    assert (again.g_idx is None) == (weight.g_idx is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_nearest_leaves_no_nearer_code(dtype):
    """Against all codes of the chosen scale and zero point, in float64."""
    dense = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    for sym in (False, True):
        rounded = round_to_nearest(dense, Grid(3, 16, sym, 1))
        scales, zeros = rounded.scales.double()[:, rounded.g_idx], rounded.zeros.double()[:, rounded.g_idx]
        candidates = (torch.arange(8, dtype=torch.float64).view(8, 1, 1) - zeros) * scales
        distance = (candidates - dense.double()).abs()
        taken = ((rounded.codes.double() - zeros) * scales - dense.double()).abs()
        # The quotient, at most 8 where it counts, is rounded to float32 first; so a tie may go the wrong way by that.
        assert bool((taken <= distance.amin(0) + scales * (2 * 8 * 2.0**-24)).all())


def test_values_on_the_grid_are_kept():
    """A weight that a scale of eight bits and the middle zero point describe exactly comes back exactly."""
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(2))
    codes[:, ::32] = 0  # the full range, so that the first clipping range is the right one
    codes[:, 1::32] = 15
    dense = (codes - 8) * 0.0625
    weight = GPTQScheme(4, 32, sym=False).quantize(dense)
    assert torch.equal(weight.dequantize(), dense)


def test_a_searched_range_is_never_worse_than_the_full_one():
    """The full range is one of those tried."""
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).pow(3)
    for sym in (False, True):
        grid = Grid(4, 32, sym, 1)
        scales, zeros = search_parameters(dense.t().contiguous(), grid)
        groups = dense.t().view(4, 32, 64)
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        full = (groups.abs().amax(1) * 2 if sym else high - low) / 15
        mantissa, exponent = torch.frexp(full)
        full = torch.ldexp((mantissa * 256).round() / 256, exponent)

        def error(scale, groups=groups, zeros=zeros):
            centred = (groups / scale[:, None] + zeros[:, None]).round().clamp(0, 15) - zeros[:, None]
            products = centred.double() * scale[:, None].double()
            residuals = (products - groups).abs()
            # In float32, a residual is off by half an ulp of the product, a sum of 32 squares by 34 roundings.
            slack = 2.0**-24 * (2 * residuals * products.abs() + 34 * residuals.square()).sum(1)
            return residuals.square().sum(1), slack

        (found, off), (plain, off_too) = error(scales), error(full)
        assert bool((found <= plain + off + off_too).all())


def test_the_algorithm_by_hand(monkeypatch):
    """
    Two inputs, H = [[4, 2], [2, 2]], no damping, scale 1, zero point 8.

    Input 0 is more important and goes first: 0.75 becomes 1, an error of -0.25. H^-1 = [[0.5, -0.5], [-0.5, 1]] moves
    the other weight by -(-0.25) / 0.5 * -0.5 = -0.25, from 2.625 to 2.375; it becomes 2, where it alone would be 3.
    """
    monkeypatch.setattr(solver, "_DAMPING", (0.0,))
    one = torch.ones(1, 1)
    monkeypatch.setattr(solver, "search_parameters", lambda columns, grid, importance: (one, 8 * one))
    dense = torch.tensor([[0.75, 2.625]])
    result = solve(dense, torch.tensor([[4.0, 2.0], [2.0, 2.0]]), Grid(4, -1, False, 1), reorder=False)
    assert result.codes.tolist() == [[9, 10]]


def test_uncorrelated_inputs_are_simply_rounded():
    """A diagonal Hessian corrects nothing: every code is the nearest for the parameters chosen by importance."""
    dense = torch.randn(16, 96, generator=torch.Generator().manual_seed(4)) * 0.02
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.5
    grid = Grid(4, 32, False, 1)
    result = solve(dense, torch.diag(diagonal), grid, reorder=False)
    scales, zeros = search_parameters(dense.t().contiguous(), grid, diagonal)
    assert torch.equal(result.scales.t(), scales)
    nearest = (dense / result.scales[:, result.g_idx] + zeros.t()[:, result.g_idx]).round().clamp(0, 15)
    assert torch.equal(result.codes, nearest.to(torch.uint8))


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_hessian_brings_the_outputs_closer(bits, sym, group_size):
    """On correlated inputs, which is what it is for; with act-order and without."""
    dense, hessian = calibrated(24, 96)
    for desc_act in (False, True):
        scheme = GPTQScheme(bits, group_size, sym, desc_act)
        plain = output_error(dense, scheme.quantize(dense).dequantize(), hessian)
        assert output_error(dense, scheme.quantize(dense, hessian=hessian).dequantize(), hessian) < plain


def test_act_order_forms_groups_by_importance():
    """The most important inputs share the first group, whatever their places."""
    dense, hessian = calibrated(16, 96)
    weight = GPTQScheme(4, 32, desc_act=True).quantize(dense, hessian=hessian)
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = diagonal[diagonal > 0].mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    assert weight.g_idx[order].tolist() == [index // 32 for index in range(96)]


@pytest.mark.parametrize(
    "hessian",
    [
        torch.zeros(64, 64),
        torch.full((64, 64), float("nan")),
        torch.full((64, 64), float("inf")),
        -torch.eye(64),
    ],
    ids=["zero", "nan", "infinite", "negative"],
)
def test_without_a_usable_hessian_the_result_is_plain_rounding(hessian):
    """Inputs that were never seen, or numbers that ran away, do no harm."""
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(6))
    scheme = GPTQScheme(4, 32)
    assert torch.equal(scheme.quantize(dense, hessian=hessian).codes, scheme.quantize(dense).codes)


@pytest.mark.parametrize("value", [0.0, 1e6, 1e-9])
def test_extreme_weights_stay_finite(value):
    """Nothing but zeros, values beyond float16's reach, values below its smallest scale."""
    dense = torch.full((16, 64), value)
    for hessian in (None, torch.eye(64) + 0.5):
        values = GPTQScheme(4, 32, sym=False).quantize(dense, hessian=hessian).dequantize()
        assert bool(torch.isfinite(values).all())
        if value == 0:
            assert not values.any()


def test_a_hessian_of_another_size_is_refused():
    """It belongs to another layer."""
    with pytest.raises(ConvertError, match=r"Hessian \[32, 32\]; expected \[64, 64\]") as caught:
        GPTQScheme(4, 32).quantize(torch.zeros(8, 64), hessian=torch.eye(32))
    assert caught.value.code == "QP-CONV-SPEC"


def test_quantizing_leaves_its_inputs_and_the_process_alone():
    """The weight, the Hessian and torch's number of threads are as before."""
    dense, hessian = calibrated(16, 64)
    before = dense.clone(), hessian.clone(), torch.get_num_threads()
    GPTQScheme(4, 32, desc_act=True).quantize(dense, hessian=hessian)
    assert torch.equal(dense, before[0])
    assert torch.equal(hessian, before[1])
    assert torch.get_num_threads() == before[2]
