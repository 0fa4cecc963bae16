"""The caller's wishes about kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from quantplug.choices import ROW_BUCKETS
from quantplug.errors import PlanError
from quantplug.inventory import ModuleInfo
from quantplug.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

DOWN = ModuleInfo("model.layers.3.mlp.down_proj", "linear")
UP = ModuleInfo("model.layers.3.mlp.up_proj", "linear")


def test_the_first_rule_that_names_a_kernel_for_a_module_holds() -> None:
    policy = Policy.parse(
        {"rule": [{"match": "re:.*down_proj", "deny": ["cpu.*"]}, {"prefer": ["cpu.int4"]}]}, "policy"
    )
    assert policy.wish(DOWN, "cpu.int4") == policy.rules[0]
    assert policy.wish(UP, "cpu.int4") == policy.rules[1]
    assert policy.wish(UP, "reference") is None


def test_the_environment_names_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[[rule]]\nmatch = "model.layers.3"\npin = "reference"\n')
    policy = Policy.from_environment({"QUANTPLUG_POLICY": str(file)})
    pin = policy.pin(DOWN)
    assert pin is not None
    assert pin.kernels == ("reference",)
    assert policy.pin(ModuleInfo("model.layers.30.mlp.down_proj", "linear")) is None
    assert Policy.from_environment({}) == Policy()


@pytest.mark.parametrize(
    ("said", "count"),
    [
        (0, 0),
        (1500, 1500),
        ("0", 0),
        ("4 GB", 4 * 10**9),
        ("1.5GB", 15 * 10**8),
        (" 500 MB", 5 * 10**8),
        ("2 kB", 2000),
    ],
)
def test_a_budget_is_bytes_or_a_text_as_people_write_it(said: object, count: int) -> None:
    assert Policy.parse({"layout_budget": said}, "policy").layout_budget == count


def test_the_numbers_of_rows_that_count_are_those_of_all_uses_unless_the_policy_names_some() -> None:
    assert Policy.parse({}, "policy").rows == Policy().rows == ROW_BUCKETS
    assert Policy.parse({"rows": [64, 1, 64]}, "policy").rows == (1, 64)
    for rows in ((), (0,)):
        with pytest.raises(PlanError, match="rows: is") as raised:
            Policy(rows=rows)
        assert raised.value.code == "QP-PLAN-POLICY"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"rules": []}, "unknown key 'rules'"),
        ({"rule": {}}, "rule is not a list"),
        ({"rule": ["x"]}, "is not a table"),
        ({"rule": [{"match": "mlp"}]}, "has no wish"),
        ({"rule": [{"pin": "a", "deny": "b"}]}, "has pin and deny"),
        ({"rule": [{"pin": ["a", "b"]}]}, "pins 2 kernels"),
        ({"rule": [{"deny": []}]}, "deny is []"),
        ({"rule": [{"deny": [3]}]}, "deny is [3]"),
        ({"rule": [{"deny": "a", "match": 3}]}, "match is 3"),
        ({"rule": [{"deny": "a", "when": "M<16"}]}, "unknown key 'when'"),
        ({"rows": []}, "rows: is []"),
        ({"rows": 16}, "rows: is 16"),
        ({"rows": [1, 0]}, "from 1 to"),
        ({"rows": [True]}, "rows: is [True]"),
        ({"rows": ["1"]}, "such as [1, 16, 2048]"),
        ({"layout_budget": -1}, "layout_budget: is -1"),
        ({"layout_budget": True}, "layout_budget: is True"),
        ({"layout_budget": "4 GiB"}, "layout_budget: is '4 GiB'"),
        ({"layout_budget": "much"}, 'such as "500 MB"'),
    ],
)
def test_a_malformed_rule_is_refused_with_its_place(table: dict[str, object], text: str) -> None:
    with pytest.raises(PlanError) as raised:
        Policy.parse(table, "policy.toml")
    assert raised.value.code == "QP-PLAN-POLICY"
    assert text in str(raised.value)
    assert raised.value.where.startswith("policy.toml")


def test_a_file_that_is_missing_or_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Policy.from_toml(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("[[rule\n")
    with pytest.raises(PlanError, match="is not TOML"):
        Policy.from_toml(tmp_path / "bad.toml")
