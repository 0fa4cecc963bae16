"""
Every case of a table that was collected from the tests, issues and behaviour of two engines (129 rows, eight families
of lists), against the one matcher.

`data/skip-cases.tsv`: `expected` is the table's answer, `ours` what is asserted here; where the two differ, `agrees` is
`no` and `note` says why. `elsewhere` marks the rows that are not about matching.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from quantplug.entries import (
    described_entries,
    exact_or_regex_entries,
    glob_entries,
    merge_params,
    only_rules,
    path_entries,
    rules_from_dynamic,
    suffix_entries,
)
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.skip import Rule, SchemeRef

BASE = SchemeRef("base", (("bits", 4), ("group_size", 128)))
GROUP = SchemeRef("group")
ORIGIN = "config.json: quantization_config.list"

with (Path(__file__).parent / "data" / "skip-cases.tsv").open(encoding="utf-8", newline="") as file:
    CASES = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def per_layer(mapping):
    """Rules of a mapping from names or expressions to parameters, where 16 bits mean unquantized."""
    entries = exact_or_regex_entries(list(mapping), ORIGIN, "fullmatch")
    return [
        Rule(e, None if mapping[e.text].get("bits", 0) >= 16 else merge_params(BASE, mapping[e.text], e.origin))
        for e in entries
    ]


READERS = {
    "paths": lambda entries: (map(Rule, path_entries(entries, ORIGIN)), BASE),
    "suffixes": lambda entries: (map(Rule, suffix_entries(entries, ORIGIN)), BASE),
    "globs": lambda entries: (map(Rule, glob_entries(entries, ORIGIN)), BASE),
    "dynamic": lambda entries: (rules_from_dynamic(entries, BASE, ORIGIN), BASE),
    "only": lambda entries: (only_rules(entries, BASE, ORIGIN), None),
    "description": lambda entries: (map(Rule, described_entries(entries, ORIGIN, frozenset({"FLOAT"}))), BASE),
    "exact or regex": lambda entries: (per_layer(entries), BASE),
    "suffix targets": lambda entries: ([Rule(e, GROUP) for e in suffix_entries(entries, ORIGIN)], None),
    "path targets": lambda entries: ([Rule(e, GROUP) for e in path_entries(list(entries), ORIGIN)], BASE),
}


def rule_on(case):
    rules, default = READERS[case["reader"]](json.loads(case["entries"]))
    module = ModuleInfo(case["path"], "linear", case["name"], shards=tuple(json.loads(case["shards"] or "[]")))
    return Matcher(list(rules), default).decide(module, set(json.loads(case["stored"])) if case["stored"] else None)


@pytest.mark.parametrize("case", [c for c in CASES if c["reader"] != "none"], ids=lambda case: case["id"])
def test_the_case_gets_our_answer(case):
    if case["ours"] == "QP-SKIP-SHARDS":
        with pytest.raises(ConfigError) as error:
            rule_on(case)
        assert error.value.code == "QP-SKIP-SHARDS"
        assert error.value.where == case["path"]
        assert "come to different schemes" in error.value.what
        return
    ruling = rule_on(case)
    if case["ours"] == "skip":
        assert ruling.use is None
    elif "=" in case["ours"]:
        name, value = case["ours"].split("=")
        assert ruling.use == merge_params(BASE, {name: int(value)}, "test")
    else:
        assert ruling.use == {"base": BASE, "group": GROUP}[case["ours"]]
    if case["warning"]:
        assert case["warning"] in "; ".join(ruling.warnings)
    else:
        assert ruling.warnings == ()


def test_the_whole_table_is_here_and_every_disagreement_says_why():
    """Two rows are not about matching; six get another answer than the table expects."""
    assert len(CASES) == 129
    assert len({case["id"] for case in CASES}) == 129
    by_agreement = {
        answer: [case["id"] for case in CASES if case["agrees"] == answer] for answer in ("yes", "no", "elsewhere")
    }
    assert by_agreement["no"] == ["70", "T4", "T11", "T12", "T18", "T60"]
    assert by_agreement["elsewhere"] == ["T64", "T97"]
    assert len(by_agreement["yes"]) == 121
    assert all(case["note"] for case in CASES if case["agrees"] != "yes")


def test_the_answers_marked_as_agreeing_do_agree():
    """The column `agrees` is checked against the words of `expected`, not only claimed."""
    starts = {
        "skip": ("skip",),
        "QP-SKIP-SHARDS": ("raise", "skip/raise"),
        "base": ("quantize", "no override", "128", "global config"),
        "group": ("matched group",),
        "bits=8": ("bits 8",),
        "group_size=32": ("32",),
    }
    special = {"T75": "resolved through wrapper alias"}
    for case in CASES:
        if case["agrees"] == "yes":
            assert case["expected"].startswith(special.get(case["id"], starts[case["ours"]])), case["id"]
