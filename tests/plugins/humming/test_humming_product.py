"""What lies around humming's product of a linear layer, by a stand-in for humming: without a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug_humming import product
from quantplug_humming.kernel import HummingKernel
from quantplug_testkit.conformance.case import Case
from quantplug_testkit.conformance.problems import CATALOGUE

KERNEL, GPU, CPU = HummingKernel(), Platform.parse("cuda:9.0"), torch.device("cpu")
ACCEPTED = {
    hazard.family: hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}
BIASED = [name for name, hazard in ACCEPTED.items() if hazard.problem.bias]


@pytest.fixture
def counters(stand_in, monkeypatch):
    """Counters of a stream, of which a CPU has none."""
    monkeypatch.setattr(product, "locks", lambda device: torch.zeros(8, dtype=torch.int32, device=device))


@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("name", ACCEPTED)
def test_every_element_is_within_the_derived_bound(name):
    case = Case(KERNEL, GPU, CPU, ACCEPTED[name])
    x = case.inputs(3)
    case.check(x, case.apply(x), "3 rows")
    case.apply(case.inputs(0))


@pytest.mark.usefixtures("counters")
def test_a_bias_is_in_its_order_before_humming_sees_it_and_again_after_a_reload():
    assert BIASED
    for name in BIASED:
        case = Case(KERNEL, GPU, CPU, ACCEPTED[name])
        kept = {key: tensor.data_ptr() for key, tensor in case.prepared.tensors.items()}
        again = KERNEL.prepare(ACCEPTED[name].problem, ACCEPTED[name].weights(), [None], CPU, case.prepared)
        assert {key: tensor.data_ptr() for key, tensor in again.tensors.items()} == kept
        x = case.inputs(2)
        case.check(x, case.apply(x), name)


@pytest.mark.usefixtures("counters")
def test_strided_and_unaligned_x_is_read_where_it_lies():
    case = Case(KERNEL, GPU, CPU, ACCEPTED["int4-group32"])
    x = case.inputs(4)
    expected = case.apply(x)
    wide = torch.full((4, 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    assert shifted.is_contiguous()
    for strided in (wide[:, ::2], shifted):
        assert torch.equal(case.apply(strided), expected)
