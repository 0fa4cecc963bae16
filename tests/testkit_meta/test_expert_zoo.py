"""The conformance tests for experts catch every kernel of their zoo, and every one of them has caught something."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch._dynamo.exc import UserError

from quantplug_testkit.conformance.experts import ARGUMENTS, MoEKernelConformance, standard_expert_tests
from quantplug_testkit.plain_experts import PlainExperts
from quantplug_testkit.zoo import EXPERT_ZOO, expert_functions
from quantplug_testkit.zoo.expert_calls import BreaksTheGraph
from quantplug_testkit.zoo.expert_promises import RaisesWhenAsked
from quantplug_testkit.zoo.promises import FOREIGN

PAIRS = [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind in EXPERT_ZOO for name in kind.caught_by]

# the two whose fault is to raise; all others must fail an assertion, or the fault is not the one they name
RAISES = {RaisesWhenAsked: ZeroDivisionError, BreaksTheGraph: UserError}


def run(kernel, name):
    """Run one standard test on a kernel, on what a covering selection gives it: a part of the whole catalogue."""

    class Vendor(MoEKernelConformance):
        pass

    Vendor.kernel = kernel
    tests = Vendor()
    asked = inspect.signature(getattr(tests, name)).parameters
    given = next((tests.given(names, whole=False) for names in ARGUMENTS if set(names) <= set(asked)), [()])
    # faults of functions show in the last families of the catalogue
    for values in reversed(given) if type(kernel).__module__ == expert_functions.__name__ else given:
        getattr(tests, name)(*values)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_broken_kernel_is_caught_by_the_tests_it_names(kind, name, monkeypatch):
    """Each fault is found by the tests that claim to find it."""
    monkeypatch.delitem(sys.modules, FOREIGN, raising=False)
    with pytest.raises(RAISES.get(kind, AssertionError)):
        run(kind(), name)


def test_every_standard_test_has_caught_something():
    """A test that no broken kernel fails shows nothing."""
    named = {name for kind in EXPERT_ZOO for name in kind.caught_by}
    # one is about the vendor's class, not the kernel; two need a GPU, see tests/device
    assert set(standard_expert_tests()) - named == {
        "test_standard_tests_are_intact",
        "test_a_captured_graph_follows_the_router",
        "test_streams_do_not_disturb_each_other",
    }


def test_the_zoo_is_as_large_as_promised():
    """Eighty faults at least, each with a name of its own."""
    assert len(EXPERT_ZOO) >= 80
    assert len({kind.name for kind in EXPERT_ZOO}) == len(EXPERT_ZOO)


@pytest.mark.parametrize("kind", EXPERT_ZOO, ids=lambda kind: kind.__name__)
def test_a_broken_kernel_is_the_plain_one_with_one_fault(kind):
    """What is broken in it says so in a docstring."""
    assert issubclass(kind, PlainExperts)
    assert inspect.getdoc(kind)
