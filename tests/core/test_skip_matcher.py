"""
The matcher: what each kind of entry covers, who decides, fused modules, counts, and what a reader is told.
"""

from __future__ import annotations

import pytest

from quantplug import ruleindex
from quantplug.entries import path_entries, rules_from_dynamic
from quantplug.errors import CheckpointError, ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher, matches
from quantplug.skip import Entry, EntryKind, EntryUse, Rule, Ruling, SchemeRef

BASE = SchemeRef("gptq", (("bits", 4),))
EIGHT = SchemeRef("gptq", (("bits", 8),))
QKV = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def entry(kind, pattern, **fields):
    return Entry(pattern, EntryKind(kind), pattern, "config.json: list[0]", **fields)


def linear(path, **fields):
    return ModuleInfo(path, "linear", **fields)


def fused(shards=QKV, path="model.layers.0.self_attn.qkv_proj"):
    return linear(path, shards=shards)


def skips(*texts):
    return [Rule(item) for item in path_entries(list(texts), "config.json: ignore")]


@pytest.mark.parametrize(
    ("kind", "pattern", "covered", "left"),
    [
        ("exact", "a.b", ["a.b"], ["a", "a.b.c", "x.a.b", "a.bc", "b"]),
        ("suffix", "mlp.gate", ["mlp.gate", "model.0.mlp.gate"], ["mlp.gate_up", "mlp.gate.x", "xmlp.gate", "gate"]),
        ("suffix", "gate", ["gate", "a.gate"], ["a.gate.b", "shared_gate", "gate_proj"]),
        ("parent", "a.3", ["a.3", "a.3.b", "a.3.b.c"], ["a.34", "a.34.b", "x.a.3", "a"]),
        ("component", "a.3", ["a.3", "a.3.b", "x.a.3", "x.a.3.b"], ["a.34", "xa.3", "x.a", "a.x.3", "3"]),
        ("component", "attn", ["attn", "x.attn.q", "x.attn"], ["x.self_attn", "attn2", "x.attn_"]),
        ("glob", "a.*.q", ["a.b.q", "a.b.c.q"], ["a.q", "x.a.b.q", "a.b.q.r", "a.b.qq"]),
        ("glob", "a.[0-2].?", ["a.0.x", "a.2.y"], ["a.3.x", "a.0.xy", "a.0."]),
        ("glob", "*", ["a", "a.b"], []),
        ("regex", r"a\.\d", ["a.1", "a.12", "a.1.b"], ["x.a.1", "a.b"]),
        ("regex", r".*q$", ["q", "a.q"], ["a.qq.r", "q.a"]),
    ],
)
def test_each_kind_covers_on_dot_boundaries(kind, pattern, covered, left):
    rule = Rule(entry(kind, pattern))
    for name in covered:
        assert Matcher([rule], BASE).decide(linear(name)).rule == rule, name
        assert matches(rule.entry, linear(name)), name
    for name in left:
        assert Matcher([rule], BASE).decide(linear(name)) == Ruling(BASE, None), name
        assert not matches(rule.entry, linear(name)), name


@pytest.mark.parametrize(
    ("mode", "covered", "left"),
    [
        ("match", ["b.c", "b.cd", "b.c.e"], ["a.b.c", "b"]),
        ("fullmatch", ["b.c"], ["b.cd", "a.b.c"]),
        ("search", ["b.c", "a.b.c", "a.b.cd"], ["b.d"]),
    ],
)
def test_expressions_are_applied_as_their_format_does(mode, covered, left):
    rule = Rule(entry("regex", r"b\.c", regex_mode=mode))
    assert all(Matcher([rule], BASE).decide(linear(name)).use is None for name in covered)
    assert all(Matcher([rule], BASE).decide(linear(name)).use == BASE for name in left)


def test_class_names_are_compared_with_the_class_only():
    matcher = Matcher([Rule(entry("class", "Linear"))], BASE)
    assert matcher.decide(linear("a", class_name="Linear")).use is None
    assert matcher.decide(linear("b", class_name="QuantLinear")).use == BASE
    assert matcher.decide(linear("Linear")).use == BASE


def test_matching_is_in_checkpoint_names_not_in_those_of_the_engine():
    module = linear("model.layers.0.ffn.up", name="model.layers.0.mlp.up")
    assert Matcher(skips("mlp"), BASE).decide(module).use is None
    assert Matcher(skips("ffn"), BASE).decide(module).use == BASE


def test_the_first_rule_that_matches_decides():
    rules = rules_from_dynamic({"+:.*down": {"bits": 8}, "-:.*layers\\.0\\..*": {}, ".*": {"bits": 2}}, BASE, "dynamic")
    matcher = Matcher(rules, BASE)
    assert matcher.decide(linear("model.layers.0.down")).rule is rules[0]
    assert matcher.decide(linear("model.layers.0.up")).rule is rules[1]
    assert matcher.decide(linear("model.layers.1.up")).use == SchemeRef("gptq", (("bits", 2),))
    assert [(use.matched, use.decided) for use in matcher.report().uses] == [(1, 1), (2, 1), (3, 1)]


def test_an_expression_with_literal_text_in_front_is_found_by_it():
    """Rules that begin with a path are only asked about names below that path; the answers are the same."""
    rules = [Rule(entry("regex", rf"^model\.layers\.{n}\.q")) for n in range(30)] + [Rule(entry("glob", "model.l*.q2"))]
    matcher = Matcher(rules, BASE)
    assert matcher.decide(linear("model.layers.7.q")).rule == rules[7]
    assert matcher.decide(linear("model.layers.17.q2")).rule == rules[17]
    assert matcher.decide(linear("model.layers.99.q2")).rule == rules[30]
    assert matcher.decide(linear("model.layers.7.k")).rule is None
    assert matcher.report().uses[17].matched == 1
    assert Matcher([Rule(entry("regex", r"model\.layers"))], BASE).decide(linear("model.layers")).use is None
    assert Matcher([Rule(entry("regex", r"model\.lay"))], BASE).decide(linear("model.layers.0")).use is None


# Fused modules


def test_a_fused_module_is_decided_by_its_shards_when_they_agree():
    ruling = Matcher(skips(*QKV), BASE).decide(fused())
    assert ruling.use is None
    assert ruling.rule.entry.text == QKV[0]
    assert ruling.shards == tuple((shard, shard) for shard in QKV)
    assert Matcher(skips("k_norm"), BASE).decide(fused()) == Ruling(BASE, None)
    assert Matcher(skips("self_attn"), BASE).decide(fused()).shards == ()


def test_an_entry_on_the_fused_name_speaks_for_every_shard():
    ruling = Matcher(skips("self_attn.qkv_proj"), BASE).decide(fused())
    assert (ruling.use, ruling.rule.entry.text, ruling.shards) == (None, "self_attn.qkv_proj", ())


def test_shards_that_come_to_different_schemes_are_an_error_that_names_them():
    """The error names each shard with its deciding entry; the matcher is as before, and the next module works."""
    matcher = Matcher(skips("q_proj", "v_proj", "lm_head"), BASE)
    with pytest.raises(ConfigError) as error:
        matcher.decide(fused())
    assert error.value.code == "QP-SKIP-SHARDS"
    assert error.value.where == "model.layers.0.self_attn.qkv_proj"
    assert error.value.what == (
        "its shards come to different schemes; kept whole: "
        "model.layers.0.self_attn.q_proj by 'q_proj' (config.json: ignore[0]), "
        "model.layers.0.self_attn.v_proj by 'v_proj' (config.json: ignore[1]); "
        "gptq bits=4: model.layers.0.self_attn.k_proj by default"
    )
    assert "all experts of a layer" in error.value.expected
    assert error.value.fix.startswith("List every shard or none")
    assert [use.matched for use in matcher.report().uses] == [0, 0, 0]
    assert matcher.decide(linear("lm_head")).use is None


def test_whoever_asks_the_tensors_gets_a_ruling_for_each_shard_instead():
    """Each with the rule that made it; all entries count as used."""
    matcher = Matcher(skips("q_proj", "v_proj"), BASE)
    ruling = matcher.decide(fused(), split=True)
    assert (ruling.use, ruling.rule) == (None, None)
    assert [(name, part.use, part.rule and part.rule.entry.text) for name, part in ruling.split] == [
        (QKV[0], None, "q_proj"),
        (QKV[1], BASE, None),
        (QKV[2], None, "v_proj"),
    ]
    assert ruling.shards == ((QKV[0], "q_proj"), (QKV[1], "default"), (QKV[2], "v_proj"))
    assert ruling.of(QKV[0]) == ruling.split[0][1]
    assert [use.matched for use in matcher.report().uses] == [1, 1]
    together = matcher.decide(fused(path="b", shards=QKV[:1]), split=True)
    assert together.split == ()
    assert together.of(QKV[0]) is together


def test_every_expert_is_asked_and_those_that_disagree_are_named():
    experts = ModuleInfo("mlp.experts", "experts", shards=("mlp.experts.0.up", "mlp.experts.1.up"))
    with pytest.raises(ConfigError, match=r"kept whole: mlp\.experts\.0\.up by"):
        Matcher(skips("experts.0"), BASE).decide(experts)
    ruling = Matcher(skips("experts.0"), BASE).decide(experts, split=True)
    assert [(shard, part.use) for shard, part in ruling.split] == [(experts.shards[0], None), (experts.shards[1], BASE)]


OTHERWISE = {
    "the default": (skips("mlp.gate"), BASE, BASE),
    "the next rule for it": ([*skips("mlp.gate"), Rule(entry("component", "gate"), EIGHT)], BASE, EIGHT),
    "not a rule for others": ([*skips("mlp.gate"), Rule(entry("component", "up"), EIGHT)], BASE, BASE),
    "of a positive list the part that speaks for it": (
        [Rule(entry("component", "up"), EIGHT), *skips("mlp.gate"), Rule(entry("parent", "model"), BASE)], None, BASE,
    ),
    "any, to judge by": ([Rule(entry("component", "up"), EIGHT), *skips("mlp.gate")], None, EIGHT),
    "none where nothing is quantized": (skips("mlp.gate"), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_the_scheme_of_a_layer_that_is_quantized_against_its_rule(name):
    """What the rules would assign if none kept it whole."""
    rules, default, expected = OTHERWISE[name]
    matcher, path = Matcher(rules, default), "model.layers.0.mlp.gate"
    assert matcher.decide(linear(path)).use is None
    assert matcher.otherwise(linear(path), path) == expected


def test_shards_disagree_about_parameters_too():
    rules = rules_from_dynamic({r".*\.q_proj": {"bits": 8}}, BASE, "dynamic")
    with pytest.raises(ConfigError, match=r"gptq bits=8: .*q_proj by .*; gptq bits=4: .*k_proj by default, .*SHARDS"):
        Matcher(rules, BASE).decide(fused())
    same = rules_from_dynamic({r".*\.q_proj": {"bits": 4}}, BASE, "dynamic")
    ruling = Matcher(same, BASE).decide(fused())
    assert ruling.use == BASE
    assert ruling.shards == ((QKV[0], r".*\.q_proj"), (QKV[1], "default"), (QKV[2], "default"))


def test_an_earlier_rule_on_one_shard_is_not_lost_behind_one_on_the_fused_name():
    """The fused name is no way around the order of the rules: q is skipped first, so the shards disagree."""
    with pytest.raises(ConfigError, match="come to different schemes"):
        Matcher(rules_from_dynamic({r"-:.*\.q_proj": {}, "+:.*self_attn.*": {"bits": 8}}, BASE, "d"), BASE).decide(
            fused()
        )
    rules = rules_from_dynamic({r"+:.*qkv_proj": {"bits": 8}, r"-:.*\.q_proj": {}}, BASE, "d")
    assert Matcher(rules, BASE).decide(fused()).use == EIGHT


def test_shards_that_the_checkpoint_does_not_have_cannot_disagree():
    matcher = Matcher(skips("q_proj", "k_proj"), BASE)
    assert matcher.decide(fused(), {QKV[0], QKV[1], "other"}).use is None
    with pytest.raises(ConfigError, match="v_proj by default"):
        matcher.decide(fused(), set(QKV))
    assert Matcher(skips("q_proj", "k_proj"), BASE).decide(fused(), set()) == Ruling(BASE, None)
    assert Matcher(skips("qkv_proj"), BASE).decide(fused(), set()).use is None


def test_experts_must_all_agree_and_long_lists_are_cut_short():
    experts = tuple(f"model.layers.0.mlp.experts.{e}.{p}" for e in range(128) for p in ("gate", "up", "down"))
    module = fused(experts, "model.layers.0.mlp.experts")
    assert Matcher(skips("mlp.experts"), BASE).decide(module).use is None
    assert Matcher([Rule(entry("glob", "*.experts.*"))], BASE).decide(module).use is None
    with pytest.raises(ConfigError) as error:
        Matcher(skips("experts.1.down"), BASE).decide(module)
    assert "kept whole: model.layers.0.mlp.experts.1.down by 'experts.1.down'" in error.value.what
    assert "and 375 more" in error.value.what
    assert len(str(error.value)) < 1500


# Counting


def test_every_entry_counts_what_it_matched_and_what_it_decided():
    matcher = Matcher(
        [*skips("self_attn", "q_proj", "lm_head", "nowhere"), Rule(entry("exact", "x", implied=True))], BASE
    )
    for path in (
        "model.layers.0.self_attn.o_proj",
        "lm_head",
        "model.layers.0.mlp.up",
        "model.layers.0.self_attn.o_proj",
    ):
        matcher.decide(linear(path))
    matcher.decide(fused())
    report = matcher.report()
    assert [(use.matched, use.decided) for use in report.uses] == [(2, 2), (1, 0), (1, 1), (0, 0), (0, 0)]
    assert [item.text for item in report.unused] == ["nowhere"]


def test_deciding_twice_counts_once_and_answers_alike():
    matcher = Matcher(skips("lm_head"), BASE)
    assert matcher.decide(linear("lm_head")) == matcher.decide(linear("lm_head"))
    assert matcher.report().uses[0].matched == 1


def test_embeddings_and_norms_are_never_given_a_scheme_but_use_entries():
    """An entry that names an embedding is not reported as unused, though the embedding stays whole anyway."""
    rules = [*skips("embed_tokens"), Rule(entry("regex", ".*"), EIGHT)]
    matcher = Matcher(rules, BASE)
    assert matcher.decide(ModuleInfo("model.embed_tokens", "embedding")) == Ruling(None, rules[0])
    assert matcher.decide(ModuleInfo("model.norm", "other")) == Ruling(None, None)
    assert [(use.matched, use.decided) for use in matcher.report().uses] == [(1, 0), (2, 0)]
    assert matcher.report().unused == ()


# What a reader is told

BELOW = ": that module and all below it"
BEGINS = ": it covers every number that begins so"


@pytest.mark.parametrize(
    ("text", "name", "warning"),
    [
        ("model.layers.34.", "model.layers.34.mlp.up", f"is read as the parent path 'model.layers.34'{BELOW}"),
        ("layers.3.", "model.layers.3.mlp.up", f"is read as the parent path 'layers.3'{BELOW}"),
        ("model", "model.layers.3.mlp.up", "is the root of the model: it covers every module below it"),
        ("re:model\\.layers\\.1", "model.layers.10.q", f"ends inside the number 10 of 'model.layers.10.q'{BEGINS}"),
        ("re:.*layers\\.1.*", "model.layers.12.q", f"ends inside the number 12 of 'model.layers.12.q'{BEGINS}"),
        ("model.layers.1*", "model.layers.12.q", f"ends inside the number 12 of 'model.layers.12.q'{BEGINS}"),
    ],
)
def test_readings_that_surprise_are_said(text, name, warning):
    assert Matcher(skips(text), BASE).decide(linear(name)).warnings == (f"{text!r} {warning}",)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model.layers.34", "model.layers.34.mlp"),
        ("visual", "visual.blocks.0.attn"),
        ("lm_head", "lm_head"),
        ("model", "model"),
        ("re:model\\.layers\\.1", "model.layers.1.mlp"),
        ("re:model\\.layers\\.10", "model.layers.10.mlp"),
        ("re:.*layers\\.\\d+.*", "model.layers.12.mlp"),
        ("re:.*\\.(?:1[0-5])\\..*", "model.layers.12.mlp"),
        ("re:.*down_proj", "model.layers.12.down_proj"),
        ("re:(a|b).*|c.*", "a.1"),
        ("model.layers.1.*", "model.layers.1.mlp"),
        ("*mlp*", "model.layers.1.mlp"),
    ],
)
def test_ordinary_readings_are_not_commented_on(text, name):
    ruling = Matcher(skips(text), BASE).decide(linear(name))
    assert ruling.use is None
    assert ruling.warnings == ()


def test_unused_entries_are_reported_with_the_nearest_names():
    names = [f"model.layers.{n}.{m}" for n in range(20) for m in ("self_attn.q_proj", "mlp.gate", "mlp.gate_up_proj")]
    rules = skips("self_attn.qproj", "model.layers.99.mlp.gate", "re:.*\\.gate_up_prj$", "zzz", "lm_head")
    rules.append(Rule(entry("class", "Conv1D")))
    matcher = Matcher(rules, BASE)
    for name in [*names, "lm_head"]:
        matcher.decide(linear(name))
    report = matcher.report()
    assert [use.nearest for use in report.uses] == [
        ("model.layers.0.self_attn.q_proj",),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.mlp.gate_up_proj",),
        (),
        (),
        (),
    ]
    assert report.warnings[0] == (
        "'self_attn.qproj' (config.json: ignore[0]) matches no module; "
        "the nearest names are model.layers.0.self_attn.q_proj"
    )
    assert report.warnings[3] == "'zzz' (config.json: ignore[3]) matches no module"
    assert len(report.warnings) == 5


def test_many_unused_entries_are_summed_up():
    matcher = Matcher(skips(*(f"nowhere.{n}" for n in range(5000))), BASE)
    matcher.decide(linear("lm_head"))
    report = matcher.report()
    assert len(report.unused) == 5000
    assert len(report.warnings) == 21
    assert report.warnings[-1] == "4,980 more entries match no module"
    assert report.uses[-1] == EntryUse(report.uses[-1].entry, 0, 0)


# Limits


def test_there_is_a_largest_number_of_patterns(monkeypatch):
    many = [Rule(entry("glob", f"*{n}")) for n in range(ruleindex.MAX_PATTERNS + 1)]
    Matcher(many[:-1], BASE)
    with pytest.raises(ConfigError) as error:
        Matcher(many, BASE)
    assert error.value.code == "QP-SKIP-PATTERN"
    assert "4,097 globs and expressions in one configuration; expected at most 4,096" in str(error.value)
    monkeypatch.setattr(ruleindex, "MAX_LITERALS", 3)
    with pytest.raises(ConfigError, match=r"ignore\[0\]: 4 entries in one configuration; expected at most 3.*PATTERN"):
        Matcher(skips("a", "b", "c", "d"), BASE)


def test_a_rule_made_by_hand_is_vetted_too():
    with pytest.raises(
        ConfigError, match=r"config.json: list\[0\]: the pattern '\(a\+\)\+\$' repeats .*QP-SKIP-PATTERN"
    ):
        Matcher([Rule(entry("regex", "(a+)+$"))], BASE)


def test_a_module_name_beyond_the_limit_is_refused_and_the_next_one_decided():
    matcher = Matcher(skips("lm_head"), BASE)
    with pytest.raises(CheckpointError, match="QP-ST-NAME"):
        matcher.decide(linear("m" * 513))
    assert matcher.decide(linear("lm_head")).use is None


def test_covering_a_fused_module_takes_its_name_or_all_its_shards():
    q, any_of_them = path_entries(["q_proj", "re:.*\\.[qkv]_proj"], "caller")
    assert not matches(q, fused())
    assert matches(any_of_them, fused())
    assert matches(path_entries(["qkv_proj"], "caller")[0], fused())
