"""The conformance class as a vendor uses it: through pytest, in ten lines, and not to be weakened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantplug.kernel import Accepted, Cost, Rejected, Traits
from quantplug.platform import Platform
from quantplug.reference import ReferenceKernel
from quantplug_testkit.conformance import CATALOGUE, LinearKernelConformance, standard_tests
from quantplug_testkit.quantizing import QuantizingKernel


class Picky(ReferenceKernel):
    """Takes 4-bit groups in bfloat16, one segment at a time."""

    name = "picky"
    traits = Traits(uniform_segments=True)

    def supports(self, problem, platform):
        if problem.dtype != "bfloat16":
            return Rejected("dtype", f"activation dtype {problem.dtype}", "bfloat16")
        if any(segment.weight.element.bits != 4 for segment in problem.segments):
            return Rejected("element", f"element {problem.segments[0].weight.element}", "4 bits")
        return Accepted(Cost(1, 1))


class Conformance(LinearKernelConformance):
    kernel = Picky()


def test_problems_follow_from_what_the_kernel_accepts():
    """Each accepted family comes, in accepted dtypes only, and no fused layer of unequal formats."""
    tests = Conformance()
    accepted = tests.accepted()
    assert accepted
    assert {hazard.problem.dtype for hazard in accepted} == {"bfloat16"}
    assert all(hazard.problem.uniform for hazard in accepted)
    assert {hazard.family for hazard in tests.families()} == {hazard.family for hazard in accepted}
    assert len(tests.samples()) == 5


def test_dtypes_take_turns_among_families():
    """A kernel that takes every dtype is tried on each family once, and on each dtype as often as the others."""

    class Reference(LinearKernelConformance):
        kernel = ReferenceKernel()

    families = Reference().families()
    unused = {hazard.family for hazard in CATALOGUE if hazard.problem.activation is not None}
    assert len(families) == len({hazard.family for hazard in CATALOGUE} - unused) + 1
    assert len(CATALOGUE) == 3 * len({hazard.family for hazard in CATALOGUE})
    counts = [sum(hazard.problem.dtype == dtype for hazard in families) for dtype in ("bfloat16", "float16", "float32")]
    assert max(counts) - min(counts) <= 1


def test_permissions_that_a_kernel_uses_are_tried_all():
    """One that leaves x as it is gets a single family of them, which show nothing new."""

    class Quantizing(LinearKernelConformance):
        kernel = QuantizingKernel()

    permitted = {hazard.family for hazard in CATALOGUE if hazard.problem.activation is not None}
    assert {hazard.family for hazard in Quantizing().accepted()} == permitted
    spared = [hazard for hazard in Conformance().accepted() if hazard.problem.activation is not None]
    assert len({hazard.family for hazard in spared}) == 1


def test_a_kernel_for_such_layers_only_is_tried_on_all_though_it_leaves_x_as_it_is():
    class Permitted(ReferenceKernel):
        name = "permitted"

        def supports(self, problem, platform):
            if problem.activation is None:
                return Rejected("activation", "the file permits none", "another kernel")
            return Accepted(Cost(1, 1))

    class Those(LinearKernelConformance):
        kernel = Permitted()

    permitted = {hazard.family for hazard in CATALOGUE if hazard.problem.activation is not None}
    assert {hazard.family for hazard in Those().accepted()} == permitted


def test_an_untouched_class_is_intact():
    """Settings are the only thing a vendor needs to change."""
    Conformance().test_standard_tests_are_intact()


def deleted(cls):
    cls.test_zero_input_gives_exactly_the_bias = None


def overridden(cls):
    cls.test_zero_input_gives_exactly_the_bias = lambda self, hazard: None


def without_reason(cls):
    cls.test_zero_input_gives_exactly_the_bias = pytest.mark.xfail(lambda self, hazard: None)


def skipped(cls):
    cls.test_zero_input_gives_exactly_the_bias = pytest.mark.skip(reason="later")(lambda self, hazard: None)


def hand_picked(cls):
    cls.accepted = lambda self: LinearKernelConformance.accepted(self)[:1]


def no_hazards(cls):
    cls.pytest_generate_tests = lambda self, metafunc: None


@pytest.mark.parametrize(
    ("weaken", "name"),
    [
        (deleted, "test_zero_input_gives_exactly_the_bias"),
        (overridden, "test_zero_input_gives_exactly_the_bias"),
        (without_reason, "test_zero_input_gives_exactly_the_bias"),
        (skipped, "test_zero_input_gives_exactly_the_bias"),
        (hand_picked, "accepted"),
        (no_hazards, "pytest_generate_tests"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_weakened_class_is_not_intact(weaken, name):
    """Deleting, overriding, skipping and choosing one's own problems are all seen."""

    class Weakened(Conformance):
        pass

    weaken(Weakened)
    with pytest.raises(AssertionError, match=f"Weakened changes {name} of LinearKernelConformance"):
        Weakened().test_standard_tests_are_intact()


def test_an_expected_failure_with_a_reason_is_permitted():
    """What is known not to pass yet may say so, test by test."""

    class Expected(Conformance):
        @pytest.mark.xfail(reason="issue 7: NaN is flushed")
        def test_nan_and_inf_stay_in_their_rows(self, hazard):
            super().test_nan_and_inf_stay_in_their_rows(hazard)

    Expected().test_standard_tests_are_intact()


def test_a_vendors_file_runs_under_pytest(tmp_path):
    """Collected by its name alone, with readable ids; a kernel with a fault fails, and the others' tests still pass."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: compiles machine code\n")
    (tmp_path / "test_vendor.py").write_text(
        "from quantplug_testkit.conformance import LinearKernelConformance\n"
        "from quantplug_testkit.zoo.results import HiddenNaN\n"
        "class TestVendor(LinearKernelConformance):\n"
        "    kernel = HiddenNaN()\n"
    )
    chosen = "intact or (nan_and_inf and fused-act-order) or (product_is_within and odd-n)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", chosen, "test_vendor.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PASSED test_vendor.py::TestVendor::test_standard_tests_are_intact" in done.stdout
    assert "test_product_is_within_the_derived_bound[odd-n-bfloat16-17-rows]" in done.stdout
    assert (
        "FAILED test_vendor.py::TestVendor::test_nan_and_inf_stay_in_their_rows[fused-act-order-float16]" in done.stdout
    )
    assert "a NaN in x gives numbers in y [fused-act-order-float16]" in done.stdout
    assert "3 failed" in done.stdout


def test_the_readme_compares_as_it_says():
    """The example of the README runs, and notices one wrong element."""
    readme = Path(__file__).parents[1] / "testkit" / "README.md"
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    example = next(text for text in examples if "linear_bound" in text)
    hazard = next(hazard for hazard in CATALOGUE if hazard.name == "odd-n-bfloat16")
    (weight,) = hazard.weights()
    x = hazard.inputs(3)
    y = (x.float() @ weight.dequantize().t()).bfloat16()
    accepted = ReferenceKernel().supports(hazard.problem, Platform.parse("cpu"))
    exec(example, {"weight": weight, "x": x, "y": y, "accepted": accepted})
    y[1, 2] += 1
    with pytest.raises(AssertionError, match=r"1 of 99 elements of result leave the bound; the worst is \[1, 2\]"):
        exec(example, {"weight": weight, "x": x, "y": y, "accepted": accepted})


def test_there_are_enough_standard_tests():
    """The list is public and says in each docstring what is asked."""
    assert len(standard_tests()) >= 30
    assert all(getattr(LinearKernelConformance, name).__doc__ for name in standard_tests())
