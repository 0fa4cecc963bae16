"""What humming cannot take as it is: scales that it cannot read, and a bias in the order of outputs."""

from __future__ import annotations

import humming_stand_in
import pytest
import torch

from quantplug.codes import code_values
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug_humming.form import form_of
from quantplug_humming.prepare import bias_order
from quantplug_humming.smallest import raise_smallest

CPU = torch.device("cpu")
SMALLEST_NORMAL = 2.0**-126


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("outputs", [33, 128])
def test_a_bias_is_brought_into_the_order_of_humming_without_the_host(outputs):
    spec = WeightSpec(ElementType.INT4, PerGroup(32), "bfloat16")
    form = form_of(LinearProblem(64, (SegmentSpec(outputs, spec),), "bfloat16", bias=True))
    bias = torch.arange(outputs, dtype=torch.bfloat16) + 1
    filled = torch.nn.functional.pad(bias, (0, 128 - outputs))
    held, expected = bias[bias_order(form, CPU)], humming_stand_in.transform_humming_bias(filled)
    assert torch.equal(held[expected > 0], expected[expected > 0])


@pytest.mark.parametrize("element", [ElementType.FLOAT8_E4M3FN, ElementType.FLOAT4_E2M1FN])
def test_the_smallest_scale_moves_into_the_codes(element):
    codes = torch.arange(1 << element.bits, dtype=torch.uint8).repeat(2, 1)
    typed = codes.view(torch.float8_e4m3fn) if element.bits == 8 else codes
    values = code_values(typed, element).double()
    exponents = torch.tensor([[0], [1]], dtype=torch.uint8)
    held, raised = raise_smallest(codes, exponents, codes.shape[1], element)
    assert raised.tolist() == [[1], [1]]
    assert torch.equal(held[1], codes[1])
    found = code_values(held.view(typed.dtype), element).double() * 2.0**-126
    exact = values * torch.tensor([[2.0**-127], [2.0**-126]], dtype=torch.float64)
    off = (found - exact).abs()
    normal = (exact.abs() >= SMALLEST_NORMAL) & exact.isfinite()
    assert normal[0].any()
    assert not off[normal].any()
    assert float(off[exact.isfinite()].max()) < SMALLEST_NORMAL / 2
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.signbit(), exact.signbit())


def test_other_scales_are_left_alone():
    codes, exponents = torch.ones(2, 64, dtype=torch.uint8), torch.full((2, 2), 1, dtype=torch.uint8)
    held, raised = raise_smallest(codes, exponents, 32, ElementType.FLOAT8_E4M3FN)
    assert held is codes
    assert raised is exponents


def test_only_groups_with_the_smallest_scale_change():
    codes = torch.full((2, 80), 0x38, dtype=torch.uint8)  # 1
    exponents = torch.tensor([[5, 0, 0], [0, 7, 1]], dtype=torch.uint8)
    held, raised = raise_smallest(codes, exponents, 32, ElementType.FLOAT8_E4M3FN)
    assert raised.tolist() == [[5, 1, 1], [1, 7, 1]]
    halved = held == 0x30
    assert [int(halved[0, :32].sum()), int(halved[0, 32:].sum())] == [0, 48]
    assert [int(halved[1, :32].sum()), int(halved[1, 32:].sum())] == [32, 0]
