"""What lies around humming's product of a linear layer, by a stand-in for humming: without a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug_humming import locks, product
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


@pytest.mark.usefixtures("counters")
def test_the_operator_is_called_where_somebody_sees_it_and_not_otherwise(monkeypatch):
    """Torch's way to it takes as long on the host as a small product on the GPU."""
    case, called = Case(KERNEL, GPU, CPU, ACCEPTED["int4-group32"]), []
    x = case.inputs(3)
    wanted = KERNEL.apply(x, case.prepared, None)
    operator = product.linear
    monkeypatch.setattr(product, "linear", lambda *given: called.append(given) or operator(*given))
    for given in (x, x.view(3, 1, -1)):
        assert torch.equal(KERNEL.apply(given, case.prepared, None).view_as(wanted), wanted)
    assert not called
    with torch.no_grad():
        assert torch.equal(KERNEL.apply(x.clone().requires_grad_(), case.prepared, None), wanted)
    assert len(called) == 1


@pytest.mark.usefixtures("counters")
def test_a_kernel_is_looked_up_once_for_each_number_of_rows(stand_in):
    case = Case(KERNEL, GPU, CPU, ACCEPTED["int4-group32"])
    made = stand_in.kernel.humming.HummingKernel.made
    before = len(made)
    for rows in (1, 3, 1, 3, 3):
        case.apply(case.inputs(rows))
    assert len(made) - before == 2


def test_streams_have_counters_of_their_own(monkeypatch):
    """Of 64 for each device; the next begins anew."""
    held = torch.zeros(2, 64, 8, dtype=torch.int32)
    current = [0]
    monkeypatch.setattr(locks, "counters", lambda device: held[device])
    monkeypatch.setattr(locks, "stream_of", lambda device: current[0])
    monkeypatch.setattr(locks, "_streams", {})
    devices = [torch.device("cuda", number) for number in range(2)]

    def of(stream, device=0):
        current[0] = stream
        return locks.locks(devices[device]).data_ptr()

    places = [of(stream) for stream in range(64)]
    assert len(set(places)) == 64
    assert [of(stream) for stream in range(64)] == places
    assert of(64) == places[0]
    assert of(0, device=1) == held[1, 0].data_ptr()
