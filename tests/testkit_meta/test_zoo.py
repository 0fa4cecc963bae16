"""The conformance tests catch every kernel of the zoo, and every one of them has caught something."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch._dynamo.exc import UserError

from quantplug.reference import ReferenceKernel
from quantplug_testkit.conformance import ARGUMENTS, LinearKernelConformance, standard_tests
from quantplug_testkit.zoo import ZOO, floats, inputs
from quantplug_testkit.zoo.calls import BreaksTheGraph
from quantplug_testkit.zoo.promises import FOREIGN, RaisesWhenAsked

PAIRS = [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind in ZOO for name in kind.caught_by]


# the two whose fault is to raise; all others must fail an assertion, or the fault is not the one they name
RAISES = {RaisesWhenAsked: ValueError, BreaksTheGraph: UserError}


# faults that show in the last families of the catalogue
LATE = (floats.__name__, inputs.__name__)


def run(kernel, name):
    """Run one standard test on a kernel, on what a covering selection gives it: a part of the whole catalogue."""

    class Vendor(LinearKernelConformance):
        pass

    Vendor.kernel = kernel
    tests = Vendor()
    asked = inspect.signature(getattr(tests, name)).parameters
    given = next((tests.given(names, whole=False) for names in ARGUMENTS if set(names) <= set(asked)), [()])
    for values in reversed(given) if type(kernel).__module__ in LATE else given:
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
    named = {name for kind in ZOO for name in kind.caught_by}
    # one is about the vendor's class, not the kernel: test_conformance_class.py breaks it; two need a GPU
    assert set(standard_tests()) - named == {
        "test_standard_tests_are_intact",
        "test_a_captured_graph_follows_its_input",
        "test_streams_do_not_disturb_each_other",
    }


def test_the_zoo_is_as_large_as_promised():
    """Eighty faults at least, each with a name of its own."""
    assert len(ZOO) >= 80
    assert len({kind.name for kind in ZOO}) == len(ZOO)


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_a_broken_kernel_is_a_reference_kernel_with_one_fault(kind):
    """What is broken in it says so in a docstring."""
    assert issubclass(kind, ReferenceKernel)
    assert inspect.getdoc(kind)
