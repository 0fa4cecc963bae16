"""`quantplug bench` as a person or a script sees it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import quantplug.benching
from quantplug.benchreport import BenchReport, Failure, Point, report_from_json, report_to_json
from quantplug_cli.main import app

KEY = {"label": "int4-g128", "shape": (4096, 4096), "dtype": "bfloat16"}


def point(kernel, rows, us, **other):
    return Point(**{
        "kernel": kernel, **KEY, "rows": rows, "us": us, "bytes_moved": 8_000_000, "gbps": 1234.5, "tflops": 0.5678,
        "of_read": 0.431, "of_flops": 0.0012, "of_dense": 1.5, **other,
    })  # fmt: skip


REPORT = BenchReport(
    "Some GPU [0]", "cuda:9.0", (("quantplug-a", "0.1.0"), ("torch", "2.11.0")), 3.1e12, (("bfloat16", 7.1e14),),
    (point("F.linear", 1, 15.5, of_dense=1.0), point("F.linear", 16, 16.7, of_dense=1.0), point("a.fast", 1, 6.78),
     point("a.fast", 16, 21.9)),
    (Failure("b.odd", "int4-g128", (4096, 4096), "y[0, 0] is nan, not 1 within 0.1 (1 elements are off)"),),
)  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    asked = {}

    def bench(cases, **given):
        asked.update(given, cases=cases)
        return REPORT

    monkeypatch.setattr(quantplug.benching, "bench", bench)

    def call(*arguments):
        return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["bench", *arguments]), asked

    return call


def lines(done):
    """Return what is printed, without the rules of tables and empty lines."""
    return [line.rstrip() for line in done.stdout.splitlines() if line.strip(" ─")]


def test_the_table_fits_80_columns_and_failures_are_told(run):
    done, _ = run("--quick")
    assert done.exit_code == 0, done.output
    assert lines(done) == [
        "cuda:9.0, Some GPU [0]",
        "reads 3100 GB/s; large products: bfloat16 710 TFLOP/s",
        "int4-g128, N x K = 4096 x 4096, bfloat16",
        " kernel     M    us      GB/s  of read  TFLOP/s  of peak  x F.linear",
        " F.linear   1  15.5  1.23e+03      43%    0.568       0%        1.00",
        "           16  16.7  1.23e+03      43%    0.568       0%        1.00",
        " a.fast     1  6.78  1.23e+03      43%    0.568       0%        1.50",
        "           16  21.9  1.23e+03      43%    0.568       0%        1.50",
        "not timed: b.odd, int4-g128 4096 x 4096: y[0, 0] is nan, not 1 within 0.1 (1",
        "elements are off)",
    ]


def test_the_options_become_cases(run):
    done, asked = run("--shape", "64x32", "--shape", "32x64", "--format", "int8", "--format", "mxfp4", "--rows", "1,8",
                      "--dtype", "float16", "--kernel", "cpu.*", "--seconds", "0.7")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = [(c.label, c.problem.out_features, c.problem.in_features, c.problem.dtype) for c in asked["cases"]]
    assert found == [(f, n, k, "float16") for f in ("int8", "mxfp4") for n, k in ((64, 32), (32, 64))]
    assert (asked["rows"], asked["kernels"], asked["seconds"]) == ((1, 8), ["cpu.*"], 0.7)


def test_quick_is_one_case_and_three_numbers_of_rows(run):
    _, asked = run("--quick")
    assert [(case.label, case.problem.out_features) for case in asked["cases"]] == [("int4-g128", 4096)]
    assert (asked["rows"], asked["seconds"]) == ((1, 16, 128), 0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "12"], "'12' is not NxK"),
        (["--shape", "0x4"], "'0x4' is not NxK"),
        (["DIR", "--format", "int8"], "a checkpoint has formats and shapes of its own"),
        (["--rows", "x"], "such as 1,16,256"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(run, arguments, says):
    done, _ = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.replace("│", " ").split())


def test_a_report_survives_its_json(run, tmp_path):
    done, _ = run("--json")
    assert report_from_json(json.loads(done.stdout), "stdout") == REPORT
    assert report_to_json(REPORT) == json.loads(done.stdout)


def test_two_reports_are_compared(run, tmp_path):
    slower = replace(
        REPORT,
        versions=(("quantplug-a", "0.2.0"), ("torch", "2.11.0")),
        points=(*REPORT.points[:2], replace(REPORT.points[2], us=13.56), point("c.new", 1, 5.0)),
    )
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, report in zip(files, (REPORT, slower), strict=True):
        file.write_text(json.dumps(report_to_json(report)))
    done, asked = run("--compare", *map(str, files))
    assert asked == {}, "nothing was measured"
    assert lines(done) == [
        "quantplug-a: 0.1.0 before, 0.2.0 after",
        "int4-g128, N x K = 4096 x 4096",
        " kernel     M  us before  us after  times as fast    x F.linear",
        " F.linear   1       15.5      15.5           1.00  1.00 to 1.00",
        "           16       16.7      16.7           1.00  1.00 to 1.00",
        " a.fast     1       6.78      13.6           0.50  1.50 to 1.50",
        "F.linear: 1.000 times as fast (geometric mean of 2)",
        "a.fast: 0.500 times as fast (geometric mean of 1)",
        "only before: 1 points (a.fast int4-g128)",
        "only after: 1 points (c.new int4-g128)",
    ]
    done, _ = run("--compare", *map(str, files), "--json")
    body = json.loads(done.stdout)
    assert (len(body["changes"]), body["changes"][2]["after"]["us"], body["only_after"][0]["kernel"]) == (
        3,
        13.56,
        "c.new",
    )


def test_plot_draws_a_panel_per_problem(run, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.svg"
    done, _ = run("--plot", str(file))
    assert done.exit_code == 0, done.output
    assert lines(done)[-1] == f"drawn: {file}"
    text = file.read_text()
    assert text.startswith("<?xml")
    done, _ = run("--plot", str(tmp_path / "missing" / "out.svg"))
    assert done.exit_code == 2
    assert "cannot write" in done.stderr


def test_plot_without_matplotlib_says_what_to_install_before_it_measures(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "importlib.util", SimpleNamespace(find_spec=lambda name: None))
    done, asked = run("--plot", "out.svg")
    assert done.exit_code == 2
    assert "pip install 'quantplug-cli[plot]'" in " ".join(done.stderr.replace("│", " ").split())
    assert asked == {}


def test_it_really_measures():
    done = CliRunner().invoke(
        app, ["bench", "--shape", "64x64", "--format", "int8", "--rows", "1,3", "--seconds", "0.001", "--kernel",
              "cpu.int8", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = report_from_json(json.loads(done.stdout), "stdout")
    assert [(p.kernel, p.rows) for p in report.points] == [
        ("F.linear", 1), ("F.linear", 3), ("cpu.int8", 1), ("cpu.int8", 3),
    ]  # fmt: skip
    assert report.failures == ()
