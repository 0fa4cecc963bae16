"""
Experts found among stored names: by rule, parsed once, and never guessed.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug import expertnames
from quantplug.checkpoint import TensorHeader, open_checkpoint
from quantplug.config import DENSE
from quantplug.errors import CheckpointError, ConfigError
from quantplug.evidence import StoredModules
from quantplug.expertnames import ExpertIndex, ExpertName, one_expert, parse_expert, stacked_files
from quantplug.expertrules import PER_EXPERT, W123, Ending, ExpertFiles, ExpertRules, joined, stacked
from quantplug.hooks import hookimpl
from quantplug.inventory import inventory_of
from quantplug.moe import ExpertFunction
from quantplug.names import Architecture
from quantplug.plugins import build_registry
from quantplug_testkit import toys
from quantplug_testkit.checkpoints import filled, write_checkpoint

REGISTRY = build_registry({"toys": toys})
CONFIG = {"model_type": "any", "num_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": False}


def header(name, *shape, dtype="bfloat16"):
    return TensorHeader(name, dtype, shape, "f.safetensors", 0, 0)


def with_family(rules):
    """Return a registry that knows a family "mine"."""
    family = Architecture("mine", ("mine",), experts=rules)
    return build_registry({"toys": toys, "mine": SimpleNamespace(quantplug_architectures=hookimpl(lambda: [family]))})


def experts_in(directory, names, config=CONFIG, registry=REGISTRY, shape=(4, 4)):
    """Return the modules of a checkpoint whose tensors have these names."""
    tensors = {name: filled("BF16", shape) for name in names}
    checkpoint = open_checkpoint(write_checkpoint(directory, tensors))
    return {module.path: module for module in inventory_of(checkpoint, config, registry, DENSE)}


def apart(container, *projections, experts=2):
    return [f"{container}.{number}.{name}.weight" for number in range(experts) for name in projections]


# -- one name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj", ExpertName("model.layers.3.mlp.experts", 17, "gate_proj")),
        ("experts.0.w1", ExpertName("experts", 0, "w1")),
        ("a.experts.0.experts.1.w1", ExpertName("a.experts.0.experts", 1, "w1")),
        ("model.layers.3.mlp.experts.gate_proj", None),
        ("model.layers.3.mlp.gate_proj", None),
        ("model.layers.3.mlp.shared_experts.0.up_proj", None),
        ("model.layers.3.mlp.experts.01.up_proj", None),
        ("model.layers.3.mlp.experts.1234567890.up_proj", None),
        ("model.layers.3.mlp.experts.\u0663.up_proj", None),
        ("model.layers.3.mlp.experts.-1.up_proj", None),
        ("model.layers.3.mlp.experts.3.", ExpertName("model.layers.3.mlp.experts", 3, "")),
        ("3.up_proj", None),
        ("", None),
    ],
)
def test_a_path_is_an_experts_or_it_is_not(path, found):
    """A number is ASCII, without leading zeros; the container ends in whole components."""
    assert parse_expert(path, ("experts",)) == found


@given(st.integers(0, 10**9 - 1), st.sampled_from(["gate_proj", "w2", "x"]))
def test_what_is_parsed_is_what_was_written(number, projection):
    """For every number that a container can have."""
    path = f"model.layers.0.mlp.experts.{number}.{projection}"
    assert parse_expert(path, ("mlp.experts",)) == ExpertName("model.layers.0.mlp.experts", number, projection)


# -- many names --------------------------------------------------------------------------------------------------------


def test_names_are_parsed_once_each_and_looked_up_without_a_scan(monkeypatch, tmp_path):
    """Twice as many experts cost twice as many parsed names, whatever is asked about them."""
    calls = []
    parse = expertnames.parse_expert
    monkeypatch.setattr(expertnames, "parse_expert", lambda *args: calls.append(1) or parse(*args))
    counts = []
    for experts in (8, 16):
        calls.clear()
        names = apart("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj", experts=experts)
        modules = experts_in(tmp_path / str(experts), names, {**CONFIG, "num_experts": experts})
        assert len(modules["model.layers.0.mlp.experts"].shards) == 3 * experts
        counts.append(len(calls))
    assert counts == [3 * 8, 3 * 16]


def test_an_index_knows_the_container_of_every_stored_projection():
    """And says nothing about what is not stored."""
    names = ["a.experts.0.w1", "a.experts.0.w2", "b.experts.5.w3", "b.experts", "a.norm"]
    index = ExpertIndex(names, ExpertRules())
    assert index.containers == ("a.experts", "b.experts")
    assert list(index.stacked) == ["b.experts"]
    assert index.container_of("b.experts.5.w3") == "b.experts"
    assert index.container_of("a.norm") is None


def test_the_spelling_is_the_one_that_most_projections_have():
    """What is named otherwise is then missing here and left over there, which is an error about both."""
    names = ["experts.0.w1", "experts.0.w3", "experts.0.w2", "experts.1.w1", "experts.1.w3", "experts.1.down_proj"]
    assert ExpertIndex(names, ExpertRules()).files_of("experts") is W123
    assert ExpertIndex(["experts.0.conv"], ExpertRules()).files_of("experts") is None


@pytest.mark.parametrize(
    ("projections", "gated"),
    [(("gate_proj", "up_proj", "down_proj"), True), (("w1", "w3", "w2"), True), (("gate_up_proj", "down_proj"), True)],
)
def test_shards_are_in_the_order_of_the_spelling_expert_by_expert(projections, gated, tmp_path):
    """Gate before up before down, whatever the order in the file."""
    modules = experts_in(tmp_path, sorted(apart("m.experts", *projections)))
    module = modules["m.experts"]
    assert module.kind == "experts"
    assert module.experts.function.gated == gated
    assert module.shards == tuple(f"m.experts.{number}.{name}" for number in (0, 1) for name in projections)
    assert list(modules) == ["m.experts"]


def test_experts_without_a_gate_have_none(tmp_path):
    """By a rule that says so."""
    rules = ExpertRules(files=(ExpertFiles(gate=""),), function=ExpertFunction("relu2"), function_field="")
    names = apart("m.experts", "up_proj", "down_proj")
    modules = experts_in(tmp_path, names, {**CONFIG, "model_type": "mine"}, with_family(rules))
    assert not modules["m.experts"].experts.function.gated
    assert modules["m.experts"].experts.function.name == "relu2"


def test_an_expert_that_is_not_stored_is_a_shard_all_the_same(tmp_path):
    """config.json counts; the planner then says what is missing."""
    modules = experts_in(tmp_path, apart("m.experts", "w1", "w3", "w2"), {**CONFIG, "num_experts": 3})
    assert "m.experts.2.w2" in modules["m.experts"].shards


# -- what config.json says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"num_experts": None}, "one of num_experts, num_local_experts"),
        ({"num_experts": 0}, "a positive number"),
        ({"num_experts": True}, "a positive number"),
        ({"num_experts": "2"}, "a positive number"),
        ({"num_experts_per_tok": None}, "one of num_experts_per_tok"),
        ({"hidden_act": "quick_gelu"}, "one of silu"),
        ({"hidden_act": 3}, "one of silu"),
    ],
)
def test_what_config_json_does_not_say_is_asked_for(fields, where, tmp_path):
    """Without the number of experts, a missing one could not be told from one that never was."""
    with pytest.raises(ConfigError, match=where) as caught:
        experts_in(tmp_path, apart("m.experts", "w1", "w3", "w2"), {**CONFIG, **fields})
    assert caught.value.code == "QP-CFG-FIELD"


MEASURED = ExpertRules(
    function=ExpertFunction("silu", limit=7.0, alpha=1.5),
    limit_field="limit",
    alpha_field="alpha",
    function_field="act",
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "silu, gated, limit 7, alpha 1.5"),
        ({"limit": 3, "alpha": 2.25, "act": "gelu"}, "gelu, gated, limit 3, alpha 2.25"),
        ({"text_config": {"limit": 4.5}}, "silu, gated, limit 4.5, alpha 1.5"),
        (
            {"limit": 3, "text_config": {"limit": 4.5, "act": "gelu_pytorch_tanh"}},
            "gelu_tanh, gated, limit 3, alpha 1.5",
        ),
    ],
)
def test_limits_and_factors_are_those_of_config_json(fields, words, tmp_path):
    """Else the family's own."""
    config = {**CONFIG, "model_type": "mine", **fields}
    modules = experts_in(tmp_path, apart("m.experts", "w1", "w3", "w2"), config, with_family(MEASURED))
    assert modules["m.experts"].experts.function.describe() == words


@pytest.mark.parametrize("value", [0, -1.0, "7", True, []])
def test_a_limit_that_is_none_is_refused(value, tmp_path):
    """It would change every value."""
    config = {**CONFIG, "model_type": "mine", "limit": value}
    with pytest.raises(ConfigError, match=r"config\.json: limit.*positive number") as caught:
        experts_in(tmp_path, apart("m.experts", "w1", "w3", "w2"), config, with_family(MEASURED))
    assert caught.value.code == "QP-CFG-FIELD"


# -- stacked -----------------------------------------------------------------------------------------------------------

BLOCKS = stacked(Ending("_blocks", "packed", flattened=True), Ending("_scales", "scale"))
PLAIN = stacked(Ending("", "weight", transposed=True), Ending("_bias", "bias"))


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"], BLOCKS),
        (["gate_up_proj", "down_proj"], PLAIN),
        (["gate_up_proj", "down_proj_bias"], PLAIN),
        (["gate_up_proj", "gate_up_proj_scales"], None),
        (["gate_up_proj", "w13"], None),
        ([], None),
    ],
)
def test_a_stacked_spelling_must_explain_every_tensor(names, files):
    """One that is left over may be a scale."""
    assert stacked_files(names, ExpertRules(files=(PER_EXPERT, BLOCKS, PLAIN))) is files


@pytest.mark.parametrize(
    ("ending", "stored", "one"),
    [
        (Ending("", "weight"), (4, 6, 8), (6, 8)),
        (Ending("", "weight", transposed=True), (4, 6, 8), (8, 6)),
        (Ending("", "weight", flattened=True), (4, 6, 8, 16), (6, 128)),
        (Ending("", "bias", transposed=True), (4, 6), (6,)),
        (Ending("", "scale", flattened=True), (4,), ()),
        (Ending("", "scale", common=True), (), ()),
        (Ending("", "scale", common=True), (1,), (1,)),
    ],
)
def test_a_header_of_a_stacked_tensor_is_read_as_one_experts(ending, stored, one):
    """In the order of axes that its format has."""
    assert one_expert(header("x", *stored), ending).shape == one


@pytest.mark.parametrize("shape", [(3, 4, 4), ()])
def test_a_stacked_tensor_holds_all_experts(shape, tmp_path):
    """Else it belongs to another model."""
    registry = with_family(ExpertRules(files=(PLAIN,)))
    tensors = {f"m.experts.{name}": filled("BF16", shape) for name in ("gate_up_proj", "down_proj")}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    inventory = inventory_of(checkpoint, {**CONFIG, "model_type": "mine"}, registry, DENSE)
    with pytest.raises(CheckpointError, match=r"m\.experts\.gate_up_proj.*expected 2 experts") as caught:
        StoredModules(checkpoint).unstack(inventory)
    assert caught.value.code == "QP-ST-SHAPE"


def test_stacked_tensors_become_modules_of_their_projections(tmp_path):
    """With the suffixes that the format has; the container's own tensors are then gone."""
    registry = with_family(ExpertRules(files=(PLAIN,)))
    shapes = {"gate_up_proj": (2, 3, 8), "gate_up_proj_bias": (2, 8), "down_proj": (2, 4, 3), "down_proj_bias": (2, 3)}
    tensors = {f"m.experts.{name}": filled("BF16", shape) for name, shape in shapes.items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    inventory = inventory_of(checkpoint, {**CONFIG, "model_type": "mine"}, registry, DENSE)
    stored = StoredModules(checkpoint)
    stored.unstack(inventory)
    assert {s: h.shape for s, h in stored.tensors("m.experts.gate_up_proj").items()} == {"weight": (8, 3), "bias": (8,)}
    assert {s: h.shape for s, h in stored.tensors("m.experts.down_proj").items()} == {"weight": (3, 4), "bias": (3,)}
    assert not stored.tensors("m.experts")
    assert next(iter(inventory)).bias


def test_spellings_say_what_they_store():
    """Names of projections in order, and whether there is a gate."""
    assert joined("w13", "w2").projections == ("w13", "w2")
    assert W123.projections == ("w1", "w3", "w2")
    assert [files.gated for files in (joined(), W123, ExpertFiles(gate=""))] == [True, True, False]
