"""
Reading lists and mappings into typed entries: what each text is taken for, and what is refused.
"""

from __future__ import annotations

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
from quantplug.ruleindex import RuleIndex
from quantplug.skip import Entry, EntryKind, SchemeRef

ORIGIN = "config.json: quantization_config.ignore"
BASE = SchemeRef("gptq", (("bits", 4), ("group_size", 128)))


def kinds(entries):
    return [(entry.kind.value, entry.pattern) for entry in entries]


@pytest.mark.parametrize(
    ("text", "kind", "pattern"),
    [
        ("lm_head", "component", "lm_head"),
        ("model.layers.3", "component", "model.layers.3"),
        ("model.layers.34.", "parent", "model.layers.34"),
        ("model.", "parent", "model"),
        ("layers.34.", "component", "layers.34"),
        (".mlp.gate", "component", "mlp.gate"),
        ("  lm_head\n", "component", "lm_head"),
        ("re:.*self_attn.*", "regex", ".*self_attn.*"),
        (" re:a b", "regex", "a b"),
        (".*lm_head.*", "regex", ".*lm_head.*"),
        (r"model\.layers\.0", "regex", r"model\.layers\.0"),
        ("(q|k)_proj", "regex", "(q|k)_proj"),
        ("*self_attn*", "glob-parent", "*self_attn*"),
        ("model.layers.[0-3].*", "glob-parent", "model.layers.[0-3].*"),
        ("layers.?.mlp", "glob-parent", "layers.?.mlp"),
        ("model.layers.0.attn.wo-1", "component", "model.layers.0.attn.wo-1"),
    ],
)
def test_a_list_of_paths_is_typed_text_by_text(text, kind, pattern):
    assert path_entries(["x", text], ORIGIN)[1:] == (Entry(text, EntryKind(kind), pattern, f"{ORIGIN}[1]"),)


@pytest.mark.parametrize(
    ("text", "covered", "others"),
    [
        ("model.layers.*.self_attn", ["model.layers.0.self_attn", "model.layers.0.self_attn.q_proj"],
         ["model.layers.0.self_attn_out", "model.layers.0"]),
        ("layers.[0-3]", ["layers.2", "layers.2.mlp.gate"], ["layers.20.mlp.gate", "layers.4"]),
        ("*.gate", ["mlp.gate", "mlp.gate.up"], ["mlp.gate_proj"]),
    ],
)  # fmt: skip
def test_a_glob_in_a_list_of_paths_covers_what_lies_below(text, covered, others):
    """Up to a dot, as plain paths do; in a list of globs over whole paths it does not."""
    index = RuleIndex(path_entries([text], ORIGIN))
    assert all(index.hits(name) == [0] for name in covered)
    assert not any(index.hits(name) for name in others)
    whole = RuleIndex(glob_entries([text], ORIGIN))
    assert [whole.hits(name) for name in covered] == [[0], []]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "an empty text, which would cover every module"),
        ("   ", "an empty text, which would cover every module"),
        (".", "'.' would cover every module"),
        ("*", "'*' would cover every module"),
        ("**", "'**' would cover every module"),
        ("*.*", "'*.*' would cover every module"),
        ("?*", "'?*' would cover every module"),
        ("re:", "'re:' is an expression without text, which would cover every module"),
        ("re: ", "'re: ' is an expression without text, which would cover every module"),
        ("..", "'..' would cover every module"),
        ("mlp..gate", "'mlp..gate' has dots with nothing between them"),
        ("..mlp", "'..mlp' has dots with nothing between them"),
        ("mlp..", "'mlp..' has dots with nothing between them"),
        ("mlp gate", "'mlp gate' has spaces or control characters"),
        ("mlp\x00gate", "'mlp\\x00gate' has spaces or control characters"),
        ("*mlp gate", "'*mlp gate' has spaces or control characters"),
        ("a" * 513, "a text of 513 characters ('aaaaa"),
        ("re:(a", "the pattern '(a' is malformed at position 0"),
        ("re:(a+)+$", "the pattern '(a+)+$' repeats without limit"),
        ("*" + "a" * 256, "a pattern of 257 characters"),
    ],
)
def test_texts_that_mean_nothing_or_everything_are_refused(text, what):
    """Nothing is lost: the same list without the text is read, afterwards, in the same process."""
    with pytest.raises(ConfigError) as error:
        path_entries(["lm_head", text], ORIGIN)
    assert error.value.code == "QP-SKIP-PATTERN"
    assert error.value.where == f"{ORIGIN}[1]"
    assert error.value.what.startswith(what)
    assert error.value.expected
    assert kinds(path_entries(["lm_head"], ORIGIN)) == [("component", "lm_head")]


READERS = [
    path_entries,
    suffix_entries,
    glob_entries,
    lambda texts, origin: exact_or_regex_entries(texts, origin, "fullmatch"),
    lambda texts, origin: only_rules(texts, BASE, origin),
]


@pytest.mark.parametrize("read", READERS)
def test_every_list_reader_wants_a_list_of_texts(read):
    assert read(None, ORIGIN) == ()
    assert read([], ORIGIN) == ()
    for texts, where, kind in (
        ("lm_head", ORIGIN, "str"), ({"lm_head": 1}, ORIGIN, "dict"), (True, ORIGIN, "bool"),
        (["a", 3], f"{ORIGIN}[1]", "int"), (["a", None], f"{ORIGIN}[1]", "NoneType"), ([b"a"], f"{ORIGIN}[0]", "bytes"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            read(texts, ORIGIN)
        assert error.value.code == "QP-CFG-FIELD"
        assert error.value.where == where
        assert f"is of type {kind}" in error.value.what
        assert "a list of texts" in error.value.expected or "a text" in error.value.expected


@pytest.mark.parametrize("read", READERS)
def test_no_list_reader_takes_an_empty_text(read):
    with pytest.raises(ConfigError, match=r"\[0\]: an empty text, which would cover every module.*QP-SKIP-PATTERN"):
        read([" "], ORIGIN)


def test_resolved_lists_hold_suffixes_class_names_and_expressions():
    texts = ["lm_head", "model.layers.0.mlp", "Linear", "re:.*gate$", "*mlp*", "model.Block", "3"]
    assert kinds(suffix_entries(texts, ORIGIN)) == [
        ("suffix", "lm_head"),
        ("suffix", "model.layers.0.mlp"),
        ("class", "Linear"),
        ("regex", ".*gate$"),
        ("suffix", "*mlp*"),
        ("suffix", "model.Block"),
        ("suffix", "3"),
    ]


def test_glob_lists_hold_globs_and_paths():
    texts = ["lm_head", "*.experts.*", "model.layers.0.", "model.layers.0.[qk]_proj"]
    assert kinds(glob_entries(texts, ORIGIN)) == [
        ("component", "lm_head"),
        ("glob", "*.experts.*"),
        ("parent", "model.layers.0"),
        ("glob", "model.layers.0.[qk]_proj"),
    ]
    with pytest.raises(ConfigError, match="would cover every module"):
        glob_entries(["*"], ORIGIN)


def test_keys_of_mappings_are_exact_names_before_expressions():
    texts = [r".*\.gate_proj$", "model.layers.0.mlp.down_proj", r".*\.mlp\..*", "lm_head"]
    entries = exact_or_regex_entries(texts, ORIGIN, "search")
    assert [entry.text for entry in entries] == [texts[1], texts[3], texts[0], texts[2]]
    assert [entry.kind.value for entry in entries] == ["exact", "exact", "regex", "regex"]
    assert {entry.regex_mode for entry in entries[2:]} == {"search"}


def test_a_description_leaves_modules_with_whole_weights_alone():
    mapping = {"a.b.weight": "FLOAT", "a.b.bias": "FLOAT", "a.c.weight": "W8A8", "version": "1.0"}
    assert kinds(described_entries(mapping, ORIGIN, frozenset({"FLOAT"}))) == [("exact", "a.b")]
    with pytest.raises(ConfigError, match=r"\['a.c.weight'\]: is of type int \(3\); expected a text \[QP-CFG-FIELD\]"):
        described_entries({"a.c.weight": 3}, ORIGIN, frozenset({"FLOAT"}))


def test_lists_of_the_only_layers_may_be_nested():
    rules = only_rules([["self_attn.q_proj"], ["mlp.down_proj", ["lm_head"]]], BASE, ORIGIN)
    assert [(rule.entry.pattern, rule.entry.origin, rule.use) for rule in rules] == [
        ("self_attn.q_proj", f"{ORIGIN}[0][0]", BASE),
        ("mlp.down_proj", f"{ORIGIN}[1][0]", BASE),
        ("lm_head", f"{ORIGIN}[1][1][0]", BASE),
    ]
    with pytest.raises(ConfigError, match=r"ignore\[0\]: is of type list"):
        path_entries([["self_attn.q_proj"]], ORIGIN)


def test_dynamic_rules_keep_their_order_and_change_parameters():
    rules = rules_from_dynamic(
        {"-:.*lm_head": {}, "+:.*down_proj": {"bits": 8, "desc_act": True}, ".*up_proj": {"group_size": 32}},
        BASE,
        ORIGIN,
    )
    assert [(rule.entry.text, rule.entry.pattern, rule.entry.origin) for rule in rules] == [
        ("-:.*lm_head", ".*lm_head", f"{ORIGIN}[0]"),
        ("+:.*down_proj", ".*down_proj", f"{ORIGIN}[1]"),
        (".*up_proj", ".*up_proj", f"{ORIGIN}[2]"),
    ]
    assert [rule.use for rule in rules] == [
        None,
        SchemeRef("gptq", (("bits", 8), ("desc_act", True), ("group_size", 128))),
        SchemeRef("gptq", (("bits", 4), ("group_size", 32))),
    ]
    assert all(rule.entry.kind is EntryKind.REGEX and rule.entry.regex_mode == "match" for rule in rules)
    assert rules_from_dynamic(None, BASE, ORIGIN) == ()


@pytest.mark.parametrize(
    ("mapping", "code", "text"),
    [
        ([], "QP-CFG-FIELD", "is of type list"),
        ({"+:a": 8}, "QP-CFG-FIELD", "ignore[0]: is of type int (8); expected an object"),
        ({"a": {"bits": [8]}}, "QP-CFG-FIELD", "ignore[0].bits: is of type list ([8])"),
        ({"-:": {}}, "QP-SKIP-PATTERN", "'-:' is an expression without text"),
        ({"": {}}, "QP-SKIP-PATTERN", "'' is an expression without text"),
        ({"x": {}, "-:(a|a)*b": {}}, "QP-SKIP-PATTERN", "ignore[1]: the pattern '(a|a)*b' repeats"),
    ],
)
def test_malformed_dynamic_rules_are_refused_where_they_stand(mapping, code, text):
    with pytest.raises(ConfigError) as error:
        rules_from_dynamic(mapping, BASE, ORIGIN)
    assert error.value.code == code
    assert text in str(error.value)


def test_changing_parameters_leaves_the_base_alone_and_sorts():
    assert merge_params(BASE, {"act": None, "bits": 4}, "x").params == (("act", None), ("bits", 4), ("group_size", 128))
    assert merge_params(BASE, {}, "x") == BASE
    assert BASE.params == (("bits", 4), ("group_size", 128))
