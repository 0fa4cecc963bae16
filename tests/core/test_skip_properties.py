"""
Properties of skip matching, and an obvious O(rules x modules) twin that has to agree with the indexed matcher.
"""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.entries import glob_entries, path_entries, suffix_entries
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher, matches
from quantplug.patterns import examine
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef

SCHEMES = [None, SchemeRef("s", (("bits", 4),)), SchemeRef("s", (("bits", 8),)), SchemeRef("t")]
WORDS = ["model", "layers", "1", "10", "12", "mlp", "gate", "gate_up", "q_proj", "k_proj", "q"]

paths = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(".".join)
literals = st.builds(
    lambda kind, pattern: Entry(pattern, kind, pattern, "o"),
    st.sampled_from([EntryKind.EXACT, EntryKind.SUFFIX, EntryKind.PARENT, EntryKind.COMPONENT]),
    paths,
)
globs = st.builds(
    lambda parts, kind: Entry("".join(parts), kind, "".join(parts), "o"),
    st.lists(st.sampled_from([*WORDS, ".", "*", "?", "[1-9]", ".*"]), min_size=1, max_size=4),
    st.sampled_from([EntryKind.GLOB, EntryKind.GLOB_PARENT]),
)
expressions = st.builds(
    lambda parts, mode: Entry("".join(parts), EntryKind.REGEX, "".join(parts), "o", mode),
    st.lists(st.sampled_from([*WORDS, r"\.", ".*", r"\d+", "(gate|q)", "[qk]_proj", "$", "^"]), min_size=1, max_size=4),
    st.sampled_from(["match", "fullmatch", "search"]),
)


def vetted(entry):
    try:
        examine(entry.pattern, entry.origin, entry.regex_mode)
    except ConfigError:
        return False
    return True


expressions = expressions.filter(vetted)
classes = st.sampled_from(["Linear", "Norm"]).map(lambda name: Entry(name, EntryKind.CLASS, name, "o"))
entries = st.one_of(literals, literals, globs, expressions, classes)
rules = st.lists(st.builds(Rule, entries, st.sampled_from(SCHEMES)), max_size=8)
modules = st.builds(
    lambda path, cls, shards: ModuleInfo(path, "linear", class_name=cls, shards=tuple(shards)),
    paths,
    st.sampled_from(["", "Linear", "Norm"]),
    st.one_of(st.just([]), st.just([]), st.lists(paths, max_size=3, unique=True)),
)


def covers(entry, name, class_name):
    """Return whether an entry matches a name, by the definition of its kind."""
    text = entry.pattern
    if entry.kind is EntryKind.EXACT:
        return name == text
    if entry.kind is EntryKind.SUFFIX:
        return f".{name}".endswith(f".{text}")
    if entry.kind is EntryKind.PARENT:
        return f"{name}.".startswith(f"{text}.")
    if entry.kind is EntryKind.COMPONENT:
        return f".{text}." in f".{name}."
    if entry.kind is EntryKind.CLASS:
        return class_name == text
    if entry.kind is EntryKind.GLOB:
        return fnmatch.fnmatchcase(name, text)
    if entry.kind is EntryKind.GLOB_PARENT:
        parts = name.split(".")
        above = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return any(fnmatch.fnmatchcase(path, text) for path in above)
    return getattr(re.compile(text), entry.regex_mode)(name) is not None


def twin(ruleset, default, module, stored):
    """Return the scheme of a module by asking every rule about every name; "disagree" when its shards do."""
    names = [shard for shard in module.shards if stored is None or shard in stored] or [module.name]
    answers = []
    for name in names:
        speaking = (
            rule
            for rule in ruleset
            if covers(rule.entry, module.name, module.class_name) or covers(rule.entry, name, "")
        )
        answers.append(next(speaking, Rule(None, default)).use)
    return answers[0] if all(answer == answers[0] for answer in answers) else "disagree"


def decide(ruleset, default, module, stored=None):
    try:
        return Matcher(ruleset, default).decide(module, stored).use
    except ConfigError as error:
        if error.code != "QP-SKIP-SHARDS":
            raise
        return "disagree"


@given(rules, st.sampled_from(SCHEMES), st.lists(modules, min_size=1, max_size=6), st.none() | st.sets(paths))
@settings(max_examples=300, deadline=None)
def test_the_indexed_matcher_agrees_with_the_obvious_one(ruleset, default, inventory, stored):
    for module in inventory:
        assert decide(ruleset, default, module, stored) == twin(ruleset, default, module, stored)


@given(rules, st.lists(modules, min_size=1, max_size=6, unique_by=lambda module: module.path))
@settings(max_examples=150, deadline=None)
def test_counts_agree_with_the_obvious_ones(ruleset, inventory):
    plain = [ModuleInfo(module.path, "linear", class_name=module.class_name) for module in inventory]
    matcher = Matcher(ruleset, None)
    for module in plain:
        matcher.decide(module)
    matched = [sum(covers(rule.entry, m.name, m.class_name) for m in plain) for rule in ruleset]
    assert [use.matched for use in matcher.report().uses] == matched
    assert sum(use.decided for use in matcher.report().uses) == sum(
        any(covers(rule.entry, m.name, m.class_name) for rule in ruleset) for m in plain
    )


@given(entries, modules)
@settings(max_examples=150, deadline=None)
def test_asking_one_entry_is_asking_a_matcher_of_one_rule(entry, module):
    whole = ModuleInfo(module.path, "linear", class_name=module.class_name)
    assert matches(entry, whole) is (Matcher([Rule(entry)], SCHEMES[1]).decide(whole).use is None)


READERS = [path_entries, suffix_entries, glob_entries]


@given(st.sampled_from(READERS), paths, st.sampled_from("0_x-"), paths)
@settings(max_examples=300, deadline=None)
def test_an_entry_never_covers_a_name_that_only_begins_or_ends_like_it(read, text, letter, around):
    """Matching is on dot boundaries: a letter more, at either end of the run, makes another name."""
    (entry,) = read([text], "o")
    for name in (text + letter, letter + text, f"{around}.{letter}{text}", f"{text}{letter}.{around}"):
        if f".{text}." not in f".{name}.":
            assert not matches(entry, ModuleInfo(name, "linear"))


@given(
    st.lists(literals | globs | expressions, max_size=6), literals | globs | expressions, st.lists(modules, min_size=1)
)
@settings(max_examples=150, deadline=None)
def test_adding_a_skip_entry_never_adds_a_quantized_layer(listed, added, inventory):
    for module in inventory:
        before = decide([Rule(entry) for entry in listed], SCHEMES[1], module)
        after = decide([Rule(entry) for entry in (*listed, added)], SCHEMES[1], module)
        assert not (before is None and after == SCHEMES[1])


@given(st.lists(literals | globs | expressions, min_size=1, max_size=6), st.data(), modules)
@settings(max_examples=150, deadline=None)
def test_a_skip_list_is_a_set(listed, data, module):
    """Order and duplicates change no answer of a list whose entries all do the same."""
    other = data.draw(st.permutations(listed)) + data.draw(st.lists(st.sampled_from(listed), max_size=3))
    assert decide(list(map(Rule, listed)), SCHEMES[1], module) == decide(list(map(Rule, other)), SCHEMES[1], module)


@given(rules, st.data(), modules)
@settings(max_examples=150, deadline=None)
def test_order_matters_among_matching_rules_only(ruleset, data, module):
    """Rules that do not match the module, or repeat an earlier one, can be anywhere, or nowhere."""
    names = (module.name, *module.shards)
    speaking = [r for r in ruleset if any(covers(r.entry, name, module.class_name) for name in names)]
    silent = [r for r in ruleset if r not in speaking]
    places = sorted(data.draw(st.lists(st.integers(0, len(speaking)), min_size=len(silent), max_size=len(silent))))
    mixed = list(speaking)
    for place, rule in reversed(list(zip(places, silent, strict=True))):
        mixed.insert(place, rule)
    answer = decide(ruleset, SCHEMES[1], module)
    assert decide(mixed, SCHEMES[1], module) == answer
    assert decide(speaking + ruleset, SCHEMES[1], module) == answer


@given(paths, st.sampled_from(["", ".", " ", "\n"]), st.sampled_from(["", ".", "  "]))
def test_reading_twice_changes_nothing(text, before, after):
    """An entry's pattern is a text that is read as itself."""
    for read in READERS:
        try:
            (entry,) = read([before + text + after], "o")
        except ConfigError:
            pytest.fail("every one of these texts has a reading")
        (again,) = read([entry.pattern], "o")
        assert again.pattern == entry.pattern


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_at_all_is_read_or_refused_with_a_code(text):
    """No text out of a file gets another exception than ours, and what is read can be matched."""
    for read in READERS:
        try:
            listed = read([text], "o")
        except ConfigError as error:
            if error.code != "QP-SKIP-PATTERN":
                raise
        else:
            matches(listed[0], ModuleInfo("model.layers.0.mlp.gate_proj", "linear"))


@given(st.text(alphabet="ab.*+?{}()[]|\\^$1,-<>=!:P", max_size=24))
@settings(max_examples=700, deadline=None)
def test_any_expression_at_all_is_vetted_or_refused_with_a_code(text):
    try:
        listed = path_entries([f"re:{text}"], "o")
    except ConfigError as error:
        if error.code != "QP-SKIP-PATTERN":
            raise
    else:
        Matcher(list(map(Rule, listed)), None).decide(ModuleInfo("ab.ba" * 50 + "1", "linear"))
