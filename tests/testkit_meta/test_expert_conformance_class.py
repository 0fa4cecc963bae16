"""The conformance class for experts as a vendor uses it, and what its catalogue and routings hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantplug.kernel import Rejected
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance, standard_expert_tests
from quantplug_testkit.conformance.experts.routing import route, scatter
from quantplug_testkit.plain_experts import PlainExperts, QuantizingExperts


class Picky(PlainExperts):
    """Takes 4-bit codes in bfloat16."""

    name = "picky"

    def supports(self, problem, platform):
        if problem.dtype != "bfloat16":
            return Rejected("dtype", f"activation dtype {problem.dtype}", "bfloat16")
        for spec in (*problem.w13, problem.w2):
            if spec.element.bits != 4:
                return Rejected("element", f"element {spec.element}", "4 bits")
        return super().supports(problem, platform)


class Conformance(MoEKernelConformance):
    kernel = Picky()


class Quantizing(MoEKernelConformance):
    kernel = QuantizingExperts()


def hazard(name):
    return next(each for each in EXPERT_CATALOGUE if each.name == name)


def test_layers_follow_from_what_the_kernel_accepts():
    """Each accepted family once for routing, each format once for memory, two for the compiler."""
    tests = Conformance()
    accepted = tests.accepted()
    assert {each.problem.dtype for each in accepted} == {"bfloat16"}
    assert all(spec.element.bits == 4 for each in accepted for spec in each.problem.w13)
    assert len(tests.families()) == len(accepted)
    assert 5 <= len(tests.forms()) < len(tests.families())
    assert [each.family for each in tests.samples()] == ["one-expert", "act-order-bias"]


def test_permissions_that_a_kernel_uses_are_tried_all():
    """One that leaves x as it is gets a single family of them, which show nothing new."""
    permitted = {each.family for each in EXPERT_CATALOGUE if each.problem.activation is not None}
    assert {each.family for each in Quantizing().accepted()} == permitted
    spared = {each.family for each in Conformance().accepted() if each.problem.activation is not None}
    assert len(spared) == 1


def deleted(cls):
    cls.test_padding_gives_exactly_zero = None


def overridden(cls):
    cls.test_padding_gives_exactly_zero = lambda self, family: None


def without_reason(cls):
    cls.test_padding_gives_exactly_zero = pytest.mark.xfail(lambda self, family: None)


def hand_picked(cls):
    cls.accepted = lambda self: MoEKernelConformance.accepted(self)[:1]


def fewer_questions(cls):
    cls.questions = lambda self: ()


def more_casts(cls):
    cls.known_casts = ("anything",)


@pytest.mark.parametrize(
    ("weaken", "name"),
    [
        (deleted, "test_padding_gives_exactly_zero"),
        (overridden, "test_padding_gives_exactly_zero"),
        (without_reason, "test_padding_gives_exactly_zero"),
        (hand_picked, "accepted"),
        (fewer_questions, "questions"),
        (more_casts, "known_casts"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_weakened_class_is_not_intact(weaken, name):
    """Deleting, overriding, choosing one's own layers, questions or casts are all seen."""

    class Weakened(Conformance):
        pass

    Conformance().test_standard_tests_are_intact()
    weaken(Weakened)
    with pytest.raises(AssertionError, match=f"Weakened changes {name} of MoEKernelConformance"):
        Weakened().test_standard_tests_are_intact()


def test_an_expected_failure_with_a_reason_is_permitted():
    """What is known not to pass yet may say so, test by test."""

    class Expected(Conformance):
        @pytest.mark.xfail(reason="issue 7: NaN is flushed")
        def test_nan_and_inf_stay_in_their_rows(self, family):
            super().test_nan_and_inf_stay_in_their_rows(family)

    Expected().test_standard_tests_are_intact()


def test_a_vendors_file_runs_under_pytest(tmp_path):
    """Collected by its name alone, with readable ids; a kernel with a fault fails, and the others' tests still pass."""
    (tmp_path / "test_vendor.py").write_text(
        "from quantplug_testkit.conformance.experts import MoEKernelConformance\n"
        "from quantplug_testkit.zoo.expert_routing import RepeatedIdOnce\n"
        "class TestVendor(MoEKernelConformance):\n"
        "    kernel = RepeatedIdOnce()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", "intact or (twice and relu)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PASSED test_vendor.py::TestVendor::test_standard_tests_are_intact" in done.stdout
    failed = re.findall(r"FAILED .*::test_an_expert_named_twice_adds_twice\[(relu\S*)-\w+\]", done.stdout)
    assert failed == ["relu", "relu2-no-gate"]


def test_the_readme_compares_experts_as_it_says():
    """The example of the README runs, and notices a result that is off by one."""
    readme = Path(__file__).parents[1] / "testkit" / "README.md"
    example = next(
        text for text in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "mixture" in text
    )
    layer = hazard("bias-bfloat16")
    kernel = PlainExperts()
    experts = [layer.expert(number) for number in range(4)]
    x, routing = layer.inputs(3), route(layer, 3)
    y = kernel.apply(x, routing.weights, routing.ids, kernel.prepare(layer.problem, experts, torch.device("cpu")))
    names = {
        "experts": experts, "problem": layer.problem, "x": x, "y": y, "topk_weights": routing.weights,
        "topk_ids": routing.ids, "accepted": kernel.supports(layer.problem, Conformance.platform),
    }  # fmt: skip
    exec(example, names)
    y[1, 2] += 1
    with pytest.raises(AssertionError, match=r"1 of 192 elements of result leave the bound; the worst is \[1, 2\]"):
        exec(example, names)


def test_there_are_enough_standard_tests():
    """The list is public and says in each docstring what is asked."""
    assert len(standard_expert_tests()) >= 40
    assert all(getattr(MoEKernelConformance, name).__doc__ for name in standard_expert_tests())


def test_experts_of_a_hazard_are_the_same_on_every_call_and_unlike_each_other():
    """By name, number and seed alone."""
    assert len({each.name for each in EXPERT_CATALOGUE}) == len(EXPERT_CATALOGUE)
    layer = hazard("act-order-bfloat16")
    one, again, other, later = (layer.expert(*given) for given in ((0,), (0,), (1,), (0, 1)))
    assert torch.equal(one.w2.codes, again.w2.codes)
    assert torch.equal(one.w13[0].g_idx, again.w13[0].g_idx)
    for different in (other, later):
        assert not torch.equal(one.w13[0].g_idx, different.w13[0].g_idx)
        assert not torch.equal(one.w2.codes, different.w2.codes)
    assert not torch.equal(one.w13[0].g_idx, one.w13[1].g_idx)


@pytest.mark.parametrize("name", ["int4-bfloat16", "three-of-eight-bfloat16", "one-expert-bfloat16"])
def test_routings_hold_what_they_are_named_after(name):
    """What a kind is for occurs in it."""
    layer = hazard(name)
    experts, top_k = layer.problem.experts, layer.problem.top_k
    chosen = {kind: route(layer, 17, kind).chosen(experts) for kind in ("spread", "mixed", "one-expert", "nowhere")}
    assert (chosen["spread"] >= 0).all()
    assert all(len(set(row)) == top_k for row in chosen["spread"].tolist())
    assert (chosen["nowhere"] == -1).all()
    assert ((chosen["one-expert"] == experts - 1).sum(axis=1) == 1).all()
    assert (chosen["mixed"] == -1).all(axis=1).any()
    assert (chosen["mixed"] >= 0).any()
    if top_k > 1:
        assert any(len(set(row)) < len(row) for row in chosen["mixed"].tolist() if -1 not in row)
    idle = route(layer, 17, "idle-ends").chosen(experts)
    assert not np.isin(idle, [0, experts - 1]).any()


def test_a_map_names_the_same_experts_in_other_numbers():
    """What was expert e is so after the map, and absent experts have rows."""
    layer = hazard("three-of-eight-bfloat16")
    local = route(layer, 40, "mixed")
    spread = scatter(layer, local)
    here = local.chosen(8) >= 0
    assert (spread.chosen(8)[here] == local.chosen(8)[here]).all()
    assert (spread.ids.numpy()[here] != local.ids.numpy()[here]).any()
    absent = (spread.expert_map == -1).nonzero().flatten()
    assert len(absent) == 3
    assert np.isin(spread.ids.numpy(), absent.numpy()).any()
