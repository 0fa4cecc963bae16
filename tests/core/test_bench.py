"""The figures of a benchmark: what they mean, and how they are kept and compared."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from toy_checkpoints import toy_checkpoint, toy_registry

from quantplug.benching import bench, cases_of_checkpoint, cases_of_recipes, default_recipes, default_rows
from quantplug.benchreport import DENSE, compare, report_from_json, report_to_json
from quantplug.errors import ConfigError, PlanError, PluginError
from quantplug.hooks import hookimpl
from quantplug.kernel import Rejected
from quantplug.platform import Platform
from quantplug.plugins import build_registry
from quantplug_testkit import toys


@pytest.fixture(scope="module")
def report():
    told = []
    cases = cases_of_recipes(["toy"], [(48, 32)], "bfloat16", toy_registry())
    found = bench(
        cases, rows=[4, 1], seconds=0.001, registry=toy_registry(), progress=lambda *words: told.append(words)
    )
    assert told == [("toy 48x32", 0, 1), ("", 1, 1)]
    return found


def test_every_kernel_is_measured_beside_torchs_own_product(report):
    names = [DENSE, "toy.fast", "toy.fast.dense", "toy.many", "toy.many.dense"]
    assert [(p.kernel, p.rows) for p in report.points] == [(name, rows) for name in names for rows in (1, 4)]
    assert report.failures == ()
    assert report.platform.startswith("cpu")
    assert dict(report.versions).keys() >= {"torch", "toys"}


def test_the_figures_follow_from_the_time(report):
    dense = {p.rows: p.us for p in report.points if p.kernel == DENSE}
    for p in report.points:
        held = 48 * 32 * 2 if p.kernel == DENSE else 48 * 32 + 48 * 4
        assert p.bytes_moved == held + p.rows * (48 + 32) * 2
        assert p.gbps == pytest.approx(p.bytes_moved / p.us / 1e3)
        assert p.tflops == pytest.approx(2 * p.rows * 48 * 32 / p.us / 1e6)
        assert p.of_read == pytest.approx(p.gbps * 1e9 / report.read)
        assert p.of_flops == pytest.approx(p.tflops * 1e12 / dict(report.flops)["bfloat16"])
        assert p.of_dense == pytest.approx(dense[p.rows] / p.us)


def test_a_report_survives_its_json(report):
    assert report_from_json(json.loads(json.dumps(report_to_json(report))), "here") == report


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(version=2), "version"),
        (lambda body: body.update(read=0), "here.read: 0; expected a number above 0"),
        (lambda body: body.update(points={}), "points[0]"),
        (lambda body: body.update(points=[3]), "points[0]: 3; expected an object"),
        (lambda body: body["points"][0].update(us="1"), "points[0].us: '1'"),
        (lambda body: body["points"][0].update(us=True), "points[0].us: True"),
        (lambda body: body["points"][1].update(shape=[1]), "points[1].shape: [1]; expected [N, K]"),
        (lambda body: body["points"][0].update(rows=0), "rows"),
        (lambda body: body["flops"].update(bfloat16=None), "bfloat16: None"),
        (lambda body: body.pop("device"), "device"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(report, change, says):
    body = report_to_json(report)
    change(body)
    with pytest.raises(ConfigError) as raised:
        report_from_json(body, "here")
    assert raised.value.code == "QP-CFG-FIELD"
    assert says in str(raised.value)
    with pytest.raises(ConfigError, match="not an object"):
        report_from_json([], "here")


def test_comparing_pairs_points_and_keeps_the_others(report):
    [first, *rest] = report.points
    found = compare(report, SimpleNamespace(points=(*rest, first)))
    assert [change.times for change in found.changes] == [1.0] * len(report.points)
    found = compare(report, SimpleNamespace(points=tuple(rest)))
    assert (found.only_before, found.only_after, len(found.changes)) == ((first,), (), len(rest))


def test_a_wrong_kernel_and_one_that_its_probe_refuses_have_no_figures():
    class Wrong(toys.ToyKernel):
        name = "a.wrong"

        def apply(self, x, prepared, bias):
            return super().apply(x, prepared, bias) * 2

    class Absent(toys.ToyKernel):
        name = "a.absent"

        def probe(self, platform):
            return Rejected("dependency", "no compiler")

    @hookimpl
    def quantplug_kernels():
        return [Wrong(), Absent()]

    vendor = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)
    registry = build_registry({"toys": toys, "vendor": vendor})
    cases = cases_of_recipes(["toy"], [(48, 32)], "bfloat16", registry)
    found = bench(cases, rows=[1], kernels=["a.wrong", "a.absent"], seconds=0.001, registry=registry)
    assert {p.kernel for p in found.points} == {DENSE}
    [failure] = found.failures
    assert (failure.kernel, failure.label, failure.shape) == ("a.wrong", "toy", (48, 32))
    assert "y[0, 0] is" in failure.reason


def test_a_checkpoints_distinct_layers_are_cases(tmp_path):
    found = cases_of_checkpoint(toy_checkpoint(tmp_path), registry=toy_registry())
    assert sorted((c.label, c.problem.out_features, c.problem.in_features, c.problem.bias) for c in found) == [
        ("int8 per channel", 16, 32, False),
        ("int8 per channel", 32, 32, True),
        ("int8 per channel", 32, 48, False),
        ("int8 per channel", 48, 32, False),
    ]


def test_defaults_are_few_and_fit_the_machine():
    assert default_recipes(toy_registry()) == ("toy",)
    assert default_rows(Platform("cpu"), quick=True) == default_rows(Platform("cuda"), quick=True)
    assert max(default_rows(Platform("cpu"), quick=False)) < max(default_rows(Platform("cuda"), quick=False))


def test_asking_for_nothing_or_for_what_is_not_there_is_an_error():
    registry = toy_registry()
    cases = cases_of_recipes(["toy"], [(48, 32)], "bfloat16", registry)
    for arguments in (([], [1]), (cases, []), (cases, [0, 1])):
        with pytest.raises(PlanError, match="nothing to measure") as raised:
            bench(arguments[0], rows=arguments[1], registry=registry)
        assert raised.value.code == "QP-PLAN-TIMINGS"
    with pytest.raises(PluginError, match="no installed kernel has such a name") as missing:
        bench(cases, rows=[1], kernels=["marlin.*"], registry=registry)
    assert missing.value.code == "QP-PLUG-MISSING"
    with pytest.raises(PluginError) as unknown:
        cases_of_recipes(["int5"], [(48, 32)], "bfloat16", registry)
    assert unknown.value.code == "QP-PLUG-MISSING"
    with pytest.raises(PlanError, match="'int8' is not an activation dtype"):
        cases_of_recipes(["toy"], [(48, 32)], "int8", registry)
