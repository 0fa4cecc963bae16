"""The covering selection: a part of the catalogue, the same every time, with every pair of aspects."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest

from quantplug.reference import ReferenceKernel
from quantplug_testkit.conformance import ARGUMENTS, LinearKernelConformance
from quantplug_testkit.conformance.aspects import aspects_of
from quantplug_testkit.conformance.covering import VARIABLE, covering, pairs, whole_catalogue
from quantplug_testkit.conformance.experts import ARGUMENTS as EXPERT_ARGUMENTS
from quantplug_testkit.conformance.experts import MoEKernelConformance
from quantplug_testkit.conformance.experts.aspects import aspects_of_experts
from quantplug_testkit.conformance.product import ROWS
from quantplug_testkit.plain_experts import PlainExperts
from quantplug_testkit.quantizing import QuantizingKernel


class Linear(LinearKernelConformance):
    kernel = ReferenceKernel()


class Quantizing(LinearKernelConformance):
    kernel = QuantizingKernel()


class Experts(MoEKernelConformance):
    kernel = PlainExperts()


CLASSES = [(Linear, ARGUMENTS), (Quantizing, ARGUMENTS), (Experts, EXPERT_ARGUMENTS)]
CASES = [
    pytest.param(cls(), names, id=f"{cls.__name__}-{names[0]}-{len(names)}") for cls, all_ in CLASSES for names in all_
]


@pytest.mark.parametrize(("tests", "names"), CASES)
def test_it_is_a_part_of_the_whole_and_the_same_every_time(tests, names):
    whole, some = tests.given(names, whole=True), tests.given(names, whole=False)
    assert some == [each for each in whole if each in some]
    assert some == tests.given(names, whole=False)
    assert len(some) < len(whole) or names == ("sample",)


@pytest.mark.parametrize("tests", [Linear(), Quantizing(), Experts()], ids=lambda tests: type(tests).__name__)
def test_tests_of_numbers_see_each_family_and_each_pair(tests):
    aspects = aspects_of_experts if isinstance(tests, MoEKernelConformance) else aspects_of

    def seen(whole):
        return {
            pair
            for hazard, rows in tests.given(("hazard", "rows"), whole=whole)
            if rows
            for pair in (hazard.family, *combinations({**aspects(hazard), "rows": rows}.items(), 2))
        }

    assert seen(whole=False) == seen(whole=True)


def test_tests_of_numbers_see_no_rows_with_every_aspect():
    aspects = {
        item
        for hazard, rows in Linear().given(("hazard", "rows"), whole=False)
        if not rows
        for item in aspects_of(hazard).items()
    }
    assert aspects == {item for hazard in Linear().accepted() for item in aspects_of(hazard).items()}
    assert 0 in ROWS


def test_tests_of_memory_see_each_aspect():
    families = [hazard for (hazard,) in Linear().given(("family",), whole=False)]
    for name in aspects_of(families[0]):
        assert {aspects_of(hazard)[name] for hazard in families} == {
            aspects_of(hazard)[name] for hazard in Linear().families()
        }


def test_what_adds_most_is_taken_first_and_of_several_the_first():
    items = ["ab", "bc", "abc", "cd", "d"]
    assert covering(items, set) == ["abc", "cd"]
    assert covering(items, lambda item: item[:1]) == ["ab", "bc", "cd", "d"]
    assert covering([], set) == []


def test_pairs_name_their_aspects():
    assert pairs({"a": 1, "b": 1, "c": 2}) == [
        (("a", 1), ("b", 1)),
        (("a", 1), ("c", 2)),
        (("b", 1), ("c", 2)),
    ]


def test_the_cpu_gets_the_whole_catalogue_and_the_environment_decides(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert (whole_catalogue("cpu"), whole_catalogue("cuda"), whole_catalogue("cuda:1")) == (True, False, False)
    monkeypatch.setenv(VARIABLE, "whole")
    assert whole_catalogue("cuda")
    monkeypatch.setenv(VARIABLE, "covering")
    assert not whole_catalogue("cpu")
    monkeypatch.setenv(VARIABLE, "half")
    with pytest.raises(pytest.UsageError, match="QUANTPLUG_CATALOGUE is 'half', and must be whole or covering"):
        whole_catalogue("cpu")


@pytest.mark.parametrize(("wish", "counts"), [("whole", {3 * len(ROWS)}), ("covering", {1, 2, 3})])
def test_pytest_tries_what_is_asked_for(tmp_path, wish, counts):
    (tmp_path / "test_vendor.py").write_text(
        "from quantplug_testkit.conformance import LinearKernelConformance\n"
        "from quantplug.reference import ReferenceKernel\n"
        "class TestVendor(LinearKernelConformance):\n"
        "    kernel = ReferenceKernel()\n"
    )
    chosen = "product_is_within and many-groups"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-k", chosen],
        cwd=tmp_path,
        env={**os.environ, VARIABLE: wish},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.count("test_product_is_within_the_derived_bound[many-groups-") in counts, done.stdout
