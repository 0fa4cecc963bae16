"""The memory for second layouts: where it is said, and how a plan shows it."""

from __future__ import annotations

import pytest

from quantplug.errors import PlanError
from quantplug.kernel import Accepted, Cost
from quantplug.plan import Candidate, Choice, Decision, LayerPlan, Plan
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerChannel, SegmentSpec, WeightSpec
from quantplug_cli.commands.plan import show
from quantplug_cli.commands.why import _show as explain
from quantplug_cli.options import read_policy

PROBLEM = LinearProblem(64, (SegmentSpec(32, WeightSpec(ElementType.INT8, PerChannel(), "float32")),), "bfloat16")


def made(extra):
    asked = tuple(Candidate(name, "p", Accepted(Cost(1, 1))) for name in ("a.few", "b.many"))
    two = (Choice("a.few", "a", 0, 15), Choice("b.many", "b", 16))
    decision = Decision(two, asked, extra_bytes=extra)
    layers = tuple(
        LayerPlan(f"m.{n}.up_proj", "linear", problem=PROBLEM, decision=0, memory_bytes=9000) for n in (0, 1)
    )
    return Plan(Platform.parse("cuda:9.0"), "bfloat16", "fp8", (), layers, (decision,))


def test_a_plan_says_how_much_memory_second_layouts_take(capsys):
    show(made(4000), "CKPT")
    said = " ".join(capsys.readouterr().out.split())
    assert "about 18.0 kB in memory, 8.0 kB of it for second layouts" in said
    assert "second layouts" not in _said(capsys, show, made(0), "CKPT")


def test_why_names_the_layout_of_every_choice(capsys):
    plan = made(4000)
    said = _said(capsys, explain, plan, plan.layers[0])
    assert "a.few for M <= 15 (estimated, layout a)" in said
    assert "b.many for M >= 16 (estimated, layout b)" in said
    assert "4.0 kB of it for the second layout, b" in said


def _said(capsys, function, *arguments):
    function(*arguments)
    return " ".join(capsys.readouterr().out.split())


def test_the_option_replaces_the_budget_of_the_policy(tmp_path, monkeypatch):
    file = tmp_path / "policy.toml"
    file.write_text('layout_budget = "1 GB"\n[[rule]]\ndeny = "cpu.*"\n')
    assert read_policy(None, None) is None
    assert read_policy(file, None).layout_budget == 10**9
    named = read_policy(file, "2GB")
    assert (named.layout_budget, len(named.rules)) == (2 * 10**9, 1)
    monkeypatch.setenv("QUANTPLUG_POLICY", str(file))
    assert len(read_policy(None, "0").rules) == 1
    with pytest.raises(PlanError, match="--layout-budget") as raised:
        read_policy(None, "lots")
    assert raised.value.code == "QP-PLAN-POLICY"
