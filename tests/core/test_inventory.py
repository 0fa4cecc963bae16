"""
Modules from the tensor names of a bare checkpoint: kinds, shapes, order, and the head that is tied.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug.checkpoint import Checkpoint, TensorHeader, open_checkpoint
from quantplug.config import DENSE, QuantConfig
from quantplug.errors import PluginError
from quantplug.hooks import hookimpl
from quantplug.inventory import ModuleInfo, inventory_of
from quantplug.names import Architecture
from quantplug.plugins import build_registry
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef
from quantplug.spec import LinearShape
from quantplug_testkit import toys
from quantplug_testkit.checkpoints import filled, write_checkpoint

REGISTRY = build_registry({"toys": toys})
TOY = QuantConfig("toy", SchemeRef("toy"))
TIED = {"model_type": "llama", "tie_word_embeddings": True}
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}


def dense(*shape):
    return filled("BF16", shape)


def modules_of(directory, tensors, model=UNTIED, config=DENSE, registry=REGISTRY):
    return list(inventory_of(open_checkpoint(write_checkpoint(directory, tensors)), model, registry, config))


def linear(path, **more):
    return ModuleInfo(path, "linear", class_name="Linear", **more)


def test_a_dense_checkpoint_gives_linear_modules_with_shapes_and_all_others(tmp_path):
    tensors = {
        "lm_head.weight": dense(10, 4),
        "model.embed_tokens.weight": dense(10, 4),
        "model.layers.0.mlp.down_proj.weight": dense(4, 6),
        "model.layers.0.mlp.down_proj.bias": dense(4),
        "model.layers.0.norm.weight": dense(4),
        "model.layers.0.conv.weight": dense(4, 1, 3),
        "model.layers.0.A_log": dense(4, 4),
        "scale": dense(1),
    }
    assert modules_of(tmp_path, tensors) == [
        ModuleInfo("model.embed_tokens", "embedding", class_name="Embedding"),
        ModuleInfo("model.layers.0", "other"),
        linear("model.layers.0.mlp.down_proj", shape=LinearShape(4, 6), bias=True),
        ModuleInfo("model.layers.0.norm", "other"),
        ModuleInfo("model.layers.0.conv", "other"),
        ModuleInfo("", "other"),
        linear("lm_head", shape=LinearShape(10, 4), head=True),
    ]


def test_what_a_scheme_of_the_configuration_stores_makes_a_module_linear_without_a_shape(tmp_path):
    tensors = {
        "a.codes": filled("I8", (4, 6)),
        "a.scale": filled("F32", (4, 1)),
        "a.bias": dense(4),
        "b.scale": filled("F32", (4, 1)),
        "c.weight": dense(4, 6),
        "d.weight": dense(4, 6),
        "d.scale": filled("F32", (4, 1)),
        "e.qweight": filled("I32", (4, 6)),
    }
    quantized = {module.path: module for module in modules_of(tmp_path, tensors, config=TOY)}
    assert quantized == {
        "a": linear("a", bias=True),
        "b": linear("b"),
        "c": linear("c", shape=LinearShape(4, 6)),
        "d": linear("d"),
        "e": ModuleInfo("e", "other"),
    }
    unquantized = {module.path: module.kind for module in modules_of(tmp_path, tensors)}
    assert unquantized == {"a": "other", "b": "other", "c": "linear", "d": "linear", "e": "other"}


def test_schemes_that_only_rules_name_count_too(tmp_path):
    entry = Entry("a", EntryKind.EXACT, "a", "here")
    config = QuantConfig("toy", None, rules=(Rule(entry), Rule(entry, SchemeRef("toy"))))
    tensors = {"a.codes": filled("I8", (4, 6)), "a.scale": filled("F32", (4, 1))}
    assert modules_of(tmp_path, tensors, config=config) == [linear("a")]


def test_a_scheme_that_is_not_installed_is_an_error(tmp_path):
    with pytest.raises(PluginError, match="'absent'") as caught:
        modules_of(tmp_path, {"a.weight": dense(2, 2)}, config=QuantConfig("x", SchemeRef("absent")))
    assert caught.value.code == "QP-PLUG-MISSING"


@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "transformer.wte", "transformer.wpe", "embed_in", "bert.embeddings.word_embeddings"]
)
def test_an_embedding_never_is_linear_even_when_it_stores_what_a_scheme_does(tmp_path, path):
    tensors = {f"{path}.weight": dense(10, 4), f"{path}.codes": filled("I8", (10, 4))}
    assert [module.kind for module in modules_of(tmp_path, tensors, config=TOY)] == ["embedding"]


def test_a_name_that_only_ends_like_an_embedding_is_linear(tmp_path):
    assert [m.kind for m in modules_of(tmp_path, {"model.no_embed_tokens.weight": dense(10, 4)})] == ["linear"]


def test_layers_come_in_the_order_of_their_numbers_whatever_the_order_in_the_file(tmp_path):
    names = [
        "model.norm",
        *(f"model.layers.{n}.{part}" for n in (10, 2, 1, 0, 11) for part in ("mlp.up", "attn.q")),
        "lm_head",
        "model.layers.2.experts.10",
        "model.layers.2.experts.9",
    ]
    tensors = {f"{name}.weight": dense(2, 2) for name in names}
    assert [module.path for module in modules_of(tmp_path, tensors)] == [
        "model.norm",
        "model.layers.0.mlp.up",
        "model.layers.0.attn.q",
        "model.layers.1.mlp.up",
        "model.layers.1.attn.q",
        "model.layers.2.mlp.up",
        "model.layers.2.attn.q",
        "model.layers.2.experts.9",
        "model.layers.2.experts.10",
        "model.layers.10.mlp.up",
        "model.layers.10.attn.q",
        "model.layers.11.mlp.up",
        "model.layers.11.attn.q",
        "lm_head",
    ]


def bare(names):
    """Return a checkpoint in memory with a scalar of each name."""
    tensors = {name: TensorHeader(name, "uint8", (1,), "f", at, at + 1) for at, name in enumerate(names)}
    return Checkpoint(None, tensors, ("f",), {})


@given(st.lists(st.text("ab01.", min_size=1, max_size=12), unique=True, max_size=12))
def test_every_tensor_belongs_to_exactly_one_module_once(names):
    inventory = inventory_of(bare(names), UNTIED, REGISTRY, DENSE)
    paths = [module.path for module in inventory]
    assert sorted(paths) == sorted({name.rpartition(".")[0] for name in names})
    again = inventory_of(bare(names), UNTIED, REGISTRY, DENSE)
    assert again == inventory


def test_a_head_that_is_tied_and_not_stored_is_added_last(tmp_path):
    tensors = {
        "model.wpe.weight": dense(7, 4),
        "model.embed_tokens.weight": dense(10, 4),
        "model.norm.weight": dense(4),
    }
    head = linear("lm_head", shape=LinearShape(10, 4), tied_to="model.embed_tokens", head=True)
    assert modules_of(tmp_path, tensors, TIED)[-1] == head
    assert all(not module.tied_to for module in modules_of(tmp_path, tensors, UNTIED))


@pytest.mark.parametrize(
    ("model", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}, "architectures": ["XForConditionalGeneration"]}, False),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["GemmaForCausalLM"]}, True),
        ({"architectures": ["BertModel"]}, False),
        ({"architectures": "LlamaForCausalLM"}, False),
        ({"tie_word_embeddings": 1}, False),
        ({}, False),
    ],
)
def test_whether_a_missing_head_is_tied_is_said_by_the_file_or_by_the_kind_of_model(tmp_path, model, tied):
    modules = modules_of(tmp_path, {"model.embed_tokens.weight": dense(10, 4)}, model)
    assert any(module.head for module in modules) == tied


def test_a_head_that_is_stored_is_not_tied_even_when_the_file_says_so(tmp_path):
    tensors = {"model.embed_tokens.weight": dense(10, 4), "lm_head.codes": filled("I8", (10, 4))}
    modules = modules_of(tmp_path, tensors, TIED, TOY)
    assert [(module.path, module.head, module.tied_to) for module in modules] == [
        ("model.embed_tokens", False, ""),
        ("lm_head", True, ""),
    ]


def test_a_tied_model_without_an_embedding_gets_no_head(tmp_path):
    assert [module.path for module in modules_of(tmp_path, {"a.weight": dense(2, 2)}, TIED)] == ["a"]


def test_a_module_in_a_numbered_layer_is_no_head(tmp_path):
    modules = modules_of(tmp_path, {"encoder.layer.0.output.weight": dense(2, 2), "output.weight": dense(2, 2)})
    assert {module.path: module.head for module in modules} == {"encoder.layer.0.output": False, "output": True}


@pytest.mark.parametrize(
    "model", [{"model_type": "odd"}, {"model_type": "wrapper", "text_config": {"model_type": "odd"}}]
)
def test_a_family_that_a_plugin_describes_has_its_own_names(tmp_path, model):
    odd = Architecture("odd", ("odd",), embeddings=("tok",), heads=("out", "to_logits"))
    registry = build_registry({"odd": SimpleNamespace(quantplug_architectures=hookimpl(lambda: [odd]))})
    tensors = {"tok.weight": dense(10, 4), "embed_tokens.weight": dense(10, 4), "to_logits.weight": dense(10, 4)}
    modules = {
        module.path: (module.kind, module.head) for module in modules_of(tmp_path, tensors, model, registry=registry)
    }
    assert modules == {
        "tok": ("embedding", False),
        "embed_tokens": ("linear", False),
        "to_logits": ("linear", True),
    }
    del tensors["to_logits.weight"]
    last = modules_of(tmp_path, tensors, model | {"tie_word_embeddings": True}, registry=registry)[-1]
    assert (last.path, last.tied_to) == ("out", "tok")
