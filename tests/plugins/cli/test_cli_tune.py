"""`quantplug tune` as a person or a script sees it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import quantplug.tuning
from quantplug.kernel import Accepted, Cost
from quantplug.plan import Candidate, Choice, Decision
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.timings import Measurement, problem_key
from quantplug.tuning import TunedProblem, TuneReport
from quantplug_cli.main import app
from quantplug_cli.text import measured, microseconds

PROBLEM = LinearProblem(576, (SegmentSpec(1536, WeightSpec(ElementType.UINT4, PerGroup(64))),), "bfloat16")
BEFORE = Decision((Choice("a.fast", "l"),), (Candidate("a.fast", "plug", Accepted(Cost(1, 1))),))
AFTER = Decision((Choice("a.fast", "l", 0, 15), Choice("a.fast.dense", "l", 16)), (), "measured")


def measurement(kernel, us, wrong=""):
    return Measurement("Some GPU", "cuda:9.0", problem_key(PROBLEM), kernel, (), us, wrong)


REPORT = TuneReport(
    "Some GPU [0]",
    "cuda:9.0",
    "/home/me/.cache/quantplug/timings.json",
    (
        TunedProblem(
            PROBLEM,
            30,
            BEFORE,
            AFTER,
            (
                measurement("a.fast", ((1, 3.214), (16, 21.94), (512, 2048.4))),
                measurement("a.fast.dense", ((1, 30.0), (16, 20.0), (512, 400.0))),
                measurement("b.odd", (), "with 16 rows, y[0, 3] is nan, not 1.5 within 0.01 (7 elements are off)"),
            ),
        ),
    ),
    ("8 experts: experts are not measured",),
    ("the measured times are ignored: /x: is not JSON",),
)


@pytest.fixture
def run(monkeypatch):
    asked = {}

    def tune(source, **given):
        asked.update(given, source=source)
        return REPORT

    monkeypatch.setattr(quantplug.tuning, "tune", tune)

    def call(*arguments):
        return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["tune", "DIR", *arguments]), asked

    return call


def test_times_choices_wrong_kernels_and_the_file_are_shown(run):
    done, asked = run()
    assert done.exit_code == 0
    assert [line.rstrip() for line in done.stdout.splitlines() if line.strip(" ─")] == [
        "DIR on cuda:9.0, Some GPU [0]; microseconds a call",
        "[1536, 576] uint4 group 64, bfloat16, 30 layers",
        "                a.",
        "         a.  fast.",
        "   M   fast  dense",
        "   1   3.21   30.0",
        "  16   21.9   20.0",
        " 512  2,048    400",
        "wrong: b.odd: with 16 rows, y[0, 3] is nan, not 1.5 within 0.01 (7 elements are",
        "off)",
        "now a.fast (M <= 15), a.fast.dense (M >= 16), by estimate a.fast",
        "not measured: 8 experts: experts are not measured",
        "warning: the measured times are ignored: /x: is not JSON",
        "30 of 30 layers run on other kernels than by estimate",
        "kept in /home/me/.cache/quantplug/timings.json",
    ]
    assert (asked["rows"], asked["seconds"], asked["override"], asked["quantize"]) == ((), 0.2, {}, None)


def test_options_reach_the_core_and_json_has_everything(run):
    done, asked = run("--rows", "16,1,16", "--seconds", "0.5", "--dtype", "float16", "--set", "bits=4", "--json")
    assert (asked["rows"], asked["seconds"], asked["dtype"]) == ((1, 16), 0.5, "float16")
    assert asked["override"] == {"bits": 4}
    body = json.loads(done.stdout)
    assert body["problems"][0]["measurements"][0]["us"] == [[1, 3.214], [16, 21.94], [512, 2048.4]]
    assert body["path"] == REPORT.path


@pytest.mark.parametrize("rows", ["", "0", "1,x", "1;2", "-4"])
def test_rows_that_are_none_are_a_usage_error(run, rows):
    done, _ = run(f"--rows={rows}")
    assert done.exit_code == 2
    assert "such as 1,16,256" in " ".join(done.stderr.replace("│", " ").split())


def test_the_kernel_for_a_number_of_rows():
    assert [AFTER.at(rows) for rows in (1, 15, 16, 9000)] == ["a.fast"] * 2 + ["a.fast.dense"] * 2


def test_microseconds_have_the_digits_that_they_are_worth():
    assert [microseconds(us) for us in (0.456, 9.999, 10.04, 99.96, 2048.4)] == [
        "0.46",
        "10.00",
        "10.0",
        "100.0",
        "2,048",
    ]
    assert measured(()) == ""
    assert measured(((1, 21.94),)) == "; measured: 21.9 us at M = 1"
    assert measured(((1, 21.94), (16, 148.0))) == "; measured: 21.9 us at M = 1, 148 at M = 16"
