"""What is handed to humming, by a stand-in for it: every value of a weight, and the scales that humming cannot read."""

from __future__ import annotations

import humming_stand_in
import pytest
import torch

from quantplug.codes import code_values
from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug.spec import ElementType
from quantplug_humming.form import form_of
from quantplug_humming.kernel import HummingKernel
from quantplug_humming.prepare import layer_config, transform
from quantplug_humming.smallest import raise_smallest
from quantplug_testkit.bounds import weight_error
from quantplug_testkit.canonical import segment_of
from quantplug_testkit.compare import assert_within
from quantplug_testkit.conformance.problems import CATALOGUE

KERNEL, GPU, CPU = HummingKernel(), Platform.parse("cuda:9.0"), torch.device("cpu")
ACCEPTED = {
    hazard.family: hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}
SMALLEST_NORMAL = 2.0**-126


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ACCEPTED)
def test_every_value_is_what_the_declared_roundings_make_of_it(name):
    hazard = ACCEPTED[name]
    form = form_of(hazard.problem)
    made = transform(hazard.problem, hazard.weights(), CPU)
    config = layer_config(form)
    decoded, scale = humming_stand_in.decode(config, made["weight"], made["weight_scale"], made.get("zero_point"))
    held = decoded * scale.reshape(-1, 1)
    plain = [cast for cast in KERNEL.supports(hazard.problem, GPU).casts if cast.what in {"scales", "weights"}]
    start = 0
    for segment in map(segment_of, hazard.weights()):
        exact, off = segment.values(), weight_error(segment, plain)
        values = held[start : start + len(exact)]
        start += len(exact)
        # the stand-in multiplies in float32, and a value may be below what that holds
        rounded = 2.0**-24 * (abs(exact) + off) + SMALLEST_NORMAL
        assert_within(values[:, : form.inputs], exact, off + rounded, name)
        # what fills up is multiplied by zeros
        assert values.isfinite().all()


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
