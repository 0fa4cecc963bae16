"""
Renaming module paths: on dot boundaries, twice is once, and never in a circle.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.errors import PluginError
from quantplug.renames import NameMap, Rename

GEMMA4_IN_VLLM = NameMap((Rename("experts", "moe.experts"),))
MIXTRAL = NameMap((Rename("block_sparse_moe", "mlp"),))

COMPONENTS = st.sampled_from(["a", "b", "c"])
RULES = st.builds(
    lambda old, new, start: Rename(".".join(old), ".".join(new), start),
    st.lists(COMPONENTS, min_size=1, max_size=3),
    st.lists(COMPONENTS, max_size=3),
    st.booleans(),
)
PATHS = st.lists(st.sampled_from(["a", "b", "c", "d", "ab", "7"]), min_size=1, max_size=8)


def made(rules):
    """Return the map, or None where it is refused."""
    try:
        return NameMap(tuple(rules))
    except PluginError:
        return None


@pytest.mark.parametrize(
    ("names", "stored", "engine"),
    [
        (
            GEMMA4_IN_VLLM, "model.layers.0.experts.3.gate_proj.weight_scale",
            "model.layers.0.moe.experts.3.gate_proj.weight_scale",
        ),
        (GEMMA4_IN_VLLM, "model.layers.0.moe.experts.3.up_proj", "model.layers.0.moe.experts.3.up_proj"),
        (GEMMA4_IN_VLLM, "experts", "moe.experts"),
        (GEMMA4_IN_VLLM, "model.layers.0.shared_experts.up_proj", "model.layers.0.shared_experts.up_proj"),
        (MIXTRAL, "model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.gate"),
        (MIXTRAL, "model.layers.1.block_sparse_moe_2.gate", "model.layers.1.block_sparse_moe_2.gate"),
        (NameMap((Rename("gate_proj", "gate_up_proj"),)), "mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight"),
        (
            NameMap((Rename("model.language_model", "language_model.model", start=True),)),
            "model.language_model.layers.0.mlp", "language_model.model.layers.0.mlp",
        ),
        (NameMap((Rename("language_model", ""),)), "model.language_model.layers.0", "model.layers.0"),
        (NameMap((Rename("w1", "gate_proj"), Rename("gate_proj", "gate"))), "experts.0.w1", "experts.0.gate"),
        (NameMap((Rename("a.a", "a"),)), "a.a.a.b", "a.b"),
        (NameMap(), "anything.at.all", "anything.at.all"),
    ],
)  # fmt: skip
def test_names_are_mapped_once_and_for_all(names, stored, engine):
    """Whole components only: what merely contains a name is another one."""
    assert names(stored) == engine
    assert names(names(stored)) == engine


@pytest.mark.parametrize(
    "rules",
    [
        [("a", "b"), ("b", "a")],
        [("a", "b"), ("b", "c"), ("c", "d.a")],
        [("a.b", "b.a")],  # ends in what it replaces together with what follows
        [("a", "b.a.c"), ("b", "")],  # one undoes what keeps the other from applying again
        [("experts", "moe.experts"), ("moe", "x")],
        [("c", "a.b"), ("b.d", "c.d")],
    ],
)
def test_rules_that_could_run_for_ever_are_refused_when_they_are_made(rules):
    """Whether or not there is a name with which they would."""
    with pytest.raises(PluginError, match="for ever") as caught:
        NameMap(tuple(Rename(old, new) for old, new in rules))
    assert caught.value.code == "QP-PLUG-RENAME"


@pytest.mark.parametrize("rule", [Rename("", "a"), Rename("a..b", "c"), Rename("a", "b."), Rename("a.b", "a.b")])
def test_what_is_no_rule_is_refused(rule):
    """Empty components, or nothing that changes."""
    with pytest.raises(PluginError, match="no renaming") as caught:
        NameMap((rule,))
    assert caught.value.code == "QP-PLUG-RENAME"


@given(rules=st.lists(RULES, max_size=3), path=PATHS)
def test_twice_is_once(rules, path):
    """For every set of rules that can be made, and every name: it comes to an end, and stays."""
    names = made(rules)
    if names is not None:
        once = names(".".join(path))
        assert names(once) == once


@given(rules=st.lists(RULES, max_size=3), path=PATHS)
def test_rules_touch_nothing_but_what_they_name(rules, path):
    """Components that no rule names stay, in their order."""
    names = made(rules)
    if names is not None:
        strange = [part for part in path if part not in "abc"]
        assert [part for part in names(".".join(path)).split(".") if part and part not in "abc"] == strange


@given(
    old=st.lists(COMPONENTS, min_size=1, max_size=2, unique=True),
    before=st.lists(st.sampled_from(["x", "y"]), max_size=2),
    after=st.lists(st.sampled_from(["x", "y"]), max_size=2),
    path=PATHS,
)
def test_components_around_the_old_ones_are_put_there_once(old, before, after, path):
    """`experts` to `moe.experts`, in general: whoever names the old components within the new ones can be served."""
    if not before + after:
        return
    names = NameMap((Rename(".".join(old), ".".join(before + old + after)),))
    once = names(".".join(path))
    assert names(once) == once
    assert [part for part in once.split(".") if part not in "xy"] == path
