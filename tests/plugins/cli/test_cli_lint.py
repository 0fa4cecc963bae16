"""`quantplug lint` as a person or a script sees it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from quantplug.findings import Finding, LintReport
from quantplug_cli.commands import lint as command
from quantplug_cli.main import app

FINDINGS = (
    Finding(
        "QP-SKIP-EVIDENCE", "error", "config.json: x[0]", "'mlp' says whole", "Name those only.", ("a.b", "a.c"), 7
    ),
    Finding("QP-LINT-ZERO", "note", "a.b.scales", "3 of 9 are 0", "", ("a.b.scales",), 1),
    Finding("QP-LINT-NOTE", "note", "", "total_size is wrong"),
)


def run(monkeypatch, findings, *arguments):
    report = LintReport("DIR", "gptq", findings, 12, 34, 5, (("vllm", "0.33.0"), ("sglang", "0.5.23")))
    asked = {}

    def lint(source, **given):
        asked.update(given, source=source)
        return report

    monkeypatch.setattr("quantplug.lint", lint, raising=False)
    return CliRunner().invoke(app, ["lint", "DIR", *arguments]), asked


def test_findings_are_shown_with_place_names_and_advice(monkeypatch):
    done, asked = run(monkeypatch, FINDINGS)
    assert done.stdout.splitlines() == [
        "DIR",
        "error QP-SKIP-EVIDENCE",
        "  config.json: x[0]: 'mlp' says whole",
        "  a.b, a.c and 5 more",
        "  Name those only.",
        "note QP-LINT-ZERO",
        "  a.b.scales: 3 of 9 are 0",
        "note QP-LINT-NOTE",
        "  total_size is wrong",
        "1 error, 2 notes; 12 modules, 34 scale tensors, 5 weights of 8-bit floats looked at; "
        "compared with vllm 0.33.0, sglang 0.5.23",
    ]
    assert done.exit_code == command.FOUND == 3
    assert (asked["deep"], asked["peers"], asked["override"]) == (False, True, {})


@pytest.mark.parametrize(("findings", "code"), [((), 0), (FINDINGS[1:], 0), (FINDINGS, 3)])
def test_the_exit_code_says_whether_an_error_was_found(monkeypatch, findings, code):
    assert run(monkeypatch, findings)[0].exit_code == code
    done, _ = run(monkeypatch, findings, "--json")
    assert done.exit_code == code
    body = json.loads(done.stdout)
    assert [finding["code"] for finding in body["findings"]] == [finding.code for finding in findings]
    assert body["worst"] == {0: "note" if findings else None, 3: "error"}[code]


def test_nothing_found_is_said(monkeypatch):
    assert "nothing found; 12 modules" in run(monkeypatch, ())[0].stdout


def test_the_options_reach_the_core(monkeypatch):
    _, asked = run(monkeypatch, (), "--deep", "--no-peers", "--dtype", "float16", "--set", "bits=4")
    assert (asked["deep"], asked["peers"], asked["dtype"], asked["override"]) == (True, False, "float16", {"bits": 4})
