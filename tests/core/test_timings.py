"""Measured times: what a plan makes of them, and the file that keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from toy_checkpoints import toy_checkpoint, toy_registry

from quantplug.errors import PlanError
from quantplug.hooks import hookimpl
from quantplug.inventory import ModuleInfo
from quantplug.kernel import Accepted, Rejected
from quantplug.plan import Choice, Plan
from quantplug.planner import plan
from quantplug.platform import Platform
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.select import select
from quantplug.spec import ElementType, LinearProblem, PerChannel, SegmentSpec, WeightSpec
from quantplug.timings import Measurement, Timings, problem_key, time_at, versions_of
from quantplug.timingstore import add_timings, read_timings, store_path
from quantplug_testkit import toys

HERE = Platform("cpu", "x86_64", versions=(("torch", "2.13.0"),), device="Some CPU, 2 threads")
MODULE = ModuleInfo("model.layers.0.mlp.up_proj", "linear")
INT8 = WeightSpec(ElementType.INT8, PerChannel(), "float32")
PROBLEM = LinearProblem(32, (SegmentSpec(48, INT8),), "bfloat16")


def measurement(kernel, *points, problem=PROBLEM, **other):
    versions = versions_of("toys", HERE, toy_registry())
    return replace(Measurement(HERE.device, str(HERE), problem_key(problem), kernel, versions, points), **other)


def decide(*measurements, policy=None, platform=HERE):
    rules = Policy() if policy is None else Policy.parse({"rule": [policy]}, "test")
    return select(PROBLEM, MODULE, platform, toy_registry(), rules, {}, Timings(measurements))


FAST = measurement("toy.fast", (1, 9.0), (16, 40.0), (64, 170.0))
MANY = measurement("toy.many", (1, 8.0), (16, 60.0), (64, 90.0))


def test_measured_times_decide_and_are_kept():
    """By its estimate toy.fast would serve up to 15 rows; measured, toy.many is faster for one row and from 64 on."""
    decision = decide(FAST, MANY)
    assert decision.basis == "measured"
    assert decision.choices == (
        Choice("toy.many", "toy", 0, 15),
        Choice("toy.fast", "toy", 16, 63),
        Choice("toy.many", "toy", 64, None),
    )
    assert decision.candidates[0].measured == MANY.us
    assert [c.kernel for c in decision.candidates][:2] == ["toy.many", "toy.fast"]


def test_a_kernel_that_was_not_measured_stands_behind_those_that_were():
    decision = decide(MANY)
    assert decision.choices == (Choice("toy.many", "toy"),)
    assert [c.kernel for c in decision.candidates][:2] == ["toy.many", "toy.fast"]


def test_a_gain_within_what_repeats_differ_by_changes_nothing():
    close = measurement("toy.many", (1, 9.1), (16, 39.0), (64, 169.0))
    assert decide(FAST, close).choices == (Choice("toy.fast", "toy"),)
    apart = measurement("toy.many", (1, 9.1), (16, 38.0), (64, 169.0))
    assert decide(FAST, apart).choices == (Choice("toy.fast", "toy", 0, 15), Choice("toy.many", "toy", 16, None))


def test_a_fallback_stays_last_however_fast_it_was():
    core = versions_of("quantplug-core", HERE, toy_registry())
    quick = measurement("reference", (1, 0.1), versions=core)
    decision = decide(FAST, quick)
    assert decision.kernel == "toy.fast"
    assert decision.candidates[-1].kernel == "reference"
    assert decision.candidates[-1].measured == ((1, 0.1),)


def test_a_layout_of_far_more_bytes_is_not_chosen_for_its_time_alone():
    class Copy(toys.ToyKernel):
        name = "a.copy"
        layout_id = "copy"
        extra = 0

        def supports(self, problem, platform):
            verdict = super().supports(problem, platform)
            return replace(verdict, extra_bytes=self.extra) if isinstance(verdict, Accepted) else verdict

    @hookimpl
    def quantplug_kernels():
        return [Copy()]

    vendor = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)
    registry = build_registry({"toys": toys, "vendor": vendor})
    versions = versions_of("vendor", HERE, registry)
    timings = Timings([FAST, measurement("a.copy", (1, 2.0), versions=versions)])
    kernels = {}
    for extra in (0, PROBLEM.stored_bytes // 2, PROBLEM.stored_bytes // 2 + 1):
        Copy.extra = extra
        decision = select(PROBLEM, MODULE, HERE, registry, Policy(), {}, timings)
        kernels[extra] = (decision.kernel, decision.candidates[1].kernel)
    chosen, passed_over = ("a.copy", "toy.fast"), ("toy.fast", "toy.many")
    assert list(kernels.values()) == [chosen, chosen, passed_over]


def test_a_policy_still_wins():
    preferred = decide(FAST, MANY, policy={"prefer": "toy.fast"})
    assert (preferred.choices, preferred.basis) == ((Choice("toy.fast", "toy"),), "estimated")
    denied = decide(FAST, MANY, policy={"deny": "toy.many"})
    assert (denied.choices, denied.basis) == ((Choice("toy.fast", "toy"),), "measured")
    assert decide(FAST, MANY, policy={"pin": "reference"}).choices == (Choice("reference", "canonical"),)


def test_what_was_wrong_is_refused_with_the_reason():
    decision = decide(FAST, replace(MANY, us=(), wrong="y[0, 3] is 7, not 5"))
    assert decision.choices == (Choice("toy.fast", "toy"),)
    refused = next(c.verdict for c in decision.candidates if c.kernel == "toy.many")
    assert refused == Rejected("probe", "was wrong when it was measured: y[0, 3] is 7, not 5", "report it to its maker")
    with pytest.raises(PlanError, match="was wrong when it was measured") as raised:
        decide(replace(MANY, us=(), wrong="y[0, 3] is 7, not 5"), policy={"pin": "toy.many"})
    assert raised.value.code == "QP-PLAN-PIN"


@pytest.mark.parametrize(
    "other",
    [
        replace(MANY, device="Another CPU"),
        replace(MANY, platform="cpu:aarch64"),
        replace(MANY, versions=tuple((n, "0.0.1" if n == "torch" else v) for n, v in MANY.versions)),
        replace(MANY, versions=tuple((n, "0.0.1" if n == "quantplug-core" else v) for n, v in MANY.versions)),
        replace(MANY, problem=problem_key(replace(PROBLEM, bias=True))),
        replace(MANY, kernel="toy.other"),
    ],
)  # fmt: skip
def test_what_was_measured_elsewhere_or_with_other_versions_does_not_count(other):
    assert decide(other).basis == "estimated"
    assert decide(MANY).basis == "measured"


def test_a_plan_for_another_machine_uses_no_measured_time():
    assert decide(FAST, MANY, platform=Platform.parse("cpu")).basis == "estimated"


def test_the_versions_are_those_of_the_platform_the_core_and_the_plugin():
    assert dict(MANY.versions).keys() == {"torch", "quantplug-core", "toys"}


def test_times_between_and_beyond_what_was_measured():
    us = ((4, 10.0), (8, 30.0))
    assert [time_at(us, rows) for rows in (1, 4, 5, 8, 16)] == [10.0, 10.0, 15.0, 30.0, 60.0]


# -- the plan


def test_a_plan_says_measured_what_was_not_and_keeps_both_in_its_json(tmp_path):
    directory = toy_checkpoint(tmp_path)
    registry = toy_registry()
    plain = plan(directory, platform=HERE, registry=registry, timings=Timings())
    problems = {layer.problem for layer in plain.layers if layer.problem is not None}
    timings = Timings([measurement("toy.many", (1, 8.0), problem=problem) for problem in problems])
    made = plan(directory, platform=HERE, registry=registry, timings=timings)
    assert {decision.basis for decision in made.decisions} == {"measured"}
    [warning] = [text for text in made.warnings if "not measured" in text]
    assert warning == (
        "not measured, hence passed over: toy.fast, toy.fast.dense, toy.many.dense; run `quantplug tune` again"
    )
    assert Plan.from_json(made.to_json()) == made
    assert made.hash != plain.hash


def test_a_plan_says_that_what_was_measured_is_of_other_versions(tmp_path):
    directory = toy_checkpoint(tmp_path)
    registry = toy_registry()
    made = plan(directory, platform=HERE, registry=registry, timings=Timings())
    problem = next(layer.problem for layer in made.layers if layer.problem is not None)
    warnings = {}
    for name, other in (("old", {"versions": ()}), ("elsewhere", {"device": "Another CPU"})):
        timings = Timings([measurement("toy.many", (1, 8.0), problem=problem, **other)])
        found = plan(directory, platform=HERE, registry=registry, timings=timings)
        assert {decision.basis for decision in found.decisions} == {"estimated"}
        warnings[name] = [text for text in found.warnings if "measured" in text]
    assert warnings == {
        "old": ["the measured times are of other versions, hence ignored; run `quantplug tune` again"],
        "elsewhere": [],
    }


def test_the_hash_covers_what_was_chosen_and_no_time(tmp_path):
    directory = toy_checkpoint(tmp_path)
    registry = toy_registry()
    plain = plan(directory, platform=HERE, registry=registry, timings=Timings())
    problems = {layer.problem for layer in plain.layers if layer.problem is not None}
    hashes = set()
    for us in (8.0, 9.0):
        timings = Timings([measurement("toy.many", (1, us), problem=problem) for problem in problems])
        hashes.add(plan(directory, platform=HERE, registry=registry, timings=timings).hash)
    assert len(hashes) == 1


def test_a_plan_reads_the_users_file(tmp_path, monkeypatch):
    directory = toy_checkpoint(tmp_path / "model")
    registry = toy_registry()
    file = tmp_path / "timings.json"
    monkeypatch.setenv("QUANTPLUG_TIMINGS", str(file))
    plain = plan(directory, platform=HERE, registry=registry)
    assert {decision.basis for decision in plain.decisions} == {"estimated"}
    problems = {layer.problem for layer in plain.layers if layer.problem is not None}
    add_timings(file, [measurement("toy.many", (1, 8.0), problem=problem) for problem in problems])
    assert {decision.basis for decision in plan(directory, platform=HERE, registry=registry).decisions} == {"measured"}
    file.write_text("{")
    broken = plan(directory, platform=HERE, registry=registry)
    assert {decision.basis for decision in broken.decisions} == {"estimated"}
    assert any("the measured times are ignored" in text for text in broken.warnings)


# -- the file


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "new" / "timings.json"
    wrong = replace(MANY, kernel="toy.wrong", us=(), wrong="NaN")
    written = add_timings(file, [FAST, MANY, wrong])
    assert read_timings(file).measurements == written.measurements
    assert set(written.measurements) == {FAST, MANY, wrong}
    assert read_timings(file).warning == ""


def test_a_later_measurement_replaces_an_earlier_one_and_leaves_others(tmp_path):
    file = tmp_path / "timings.json"
    add_timings(file, [FAST, MANY])
    later = measurement("toy.many", (1, 5.0), versions=(("torch", "3.0"),))
    add_timings(file, [later])
    assert set(read_timings(file).measurements) == {FAST, later}


def test_no_file_is_nothing_measured(tmp_path):
    for path in (None, tmp_path / "none.json"):
        found = read_timings(path)
        assert (len(found), found.warning) == (0, "")


def test_the_file_is_where_the_variable_says_or_in_the_users_cache(tmp_path):
    assert store_path({"QUANTPLUG_TIMINGS": "off"}) is None
    assert store_path({"QUANTPLUG_TIMINGS": str(tmp_path / "t.json")}) == tmp_path / "t.json"
    default = store_path({})
    assert default is not None
    assert (default.parent.name, default.name) == ("quantplug", "timings.json")


def spoilt(change):
    file = {"version": 1, "measurements": [{
        "device": "d", "platform": "cpu", "problem": {}, "kernel": "k", "versions": {}, "us": [[1, 2.0]], "wrong": "",
    }]}  # fmt: skip
    change(file)
    return json.dumps(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1"),
        ("[]", "no measurements"),
        (spoilt(lambda f: f.update(version=2)), "version: 2; expected 1"),
        (spoilt(lambda f: f.update(version=True)), "version: True; expected 1"),
        (spoilt(lambda f: f["measurements"][0].pop("wrong")), "measurements[0]: not a measurement"),
        (spoilt(lambda f: f["measurements"][0].update(device=3)), "measurements[0].device: 3; expected a text"),
        (spoilt(lambda f: f["measurements"][0].update(problem="p")), "measurements[0].problem"),
        (spoilt(lambda f: f["measurements"][0].update(versions={"a": 1})), "measurements[0].versions"),
        (spoilt(lambda f: f["measurements"][0].update(us=[[1, 0]])), "measurements[0].us: [1, 0]"),
        (spoilt(lambda f: f["measurements"][0].update(us=[[True, 1.0]])), "measurements[0].us: [True, 1.0]"),
        (spoilt(lambda f: f["measurements"][0].update(us=[[2, 1.0], [1, 1.0]])), "by rising rows"),
        (spoilt(lambda f: f["measurements"][0].update(us=[])), "by rising rows"),
    ],
)
def test_a_file_that_cannot_be_understood_is_ignored_with_a_warning_and_replaced(tmp_path, text, says):
    file = tmp_path / "timings.json"
    file.write_text(text)
    found = read_timings(file)
    assert len(found) == 0
    assert found.warning.startswith(f"the measured times are ignored: {file}")
    assert says in found.warning
    assert found.warning.endswith("`quantplug tune` writes them anew")
    add_timings(file, [FAST])
    assert read_timings(file).measurements == (FAST,)


WRITER = """
import sys
from quantplug.timings import Measurement
from quantplug.timingstore import add_timings
from pathlib import Path
for n in range(20):
    add_timings(Path(sys.argv[1]), [Measurement("d", "cpu", "{}", f"{sys.argv[2]}.{n}", (), ((1, 1.0),))])
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    file = tmp_path / "timings.json"
    started = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), name]) for name in "abc"]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    found = read_timings(file)
    assert found.warning == ""
    assert {m.kernel for m in found.measurements} == {f"{name}.{n}" for name in "abc" for n in range(20)}
    assert not list(tmp_path.glob("*.new"))


def test_a_file_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="measured times cannot be stored") as raised:
        add_timings(tmp_path / "file" / "timings.json", [FAST])
    assert raised.value.code == "QP-PLAN-TIMINGS"
    assert "QUANTPLUG_TIMINGS" in str(raised.value)
