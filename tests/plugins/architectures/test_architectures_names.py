"""
Embeddings, heads, fused layers and renamed modules, as the families declare them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import DENSE_FAMILIES, EXPERTS, FAMILIES, LAYERS, REFERENCE

from quantplug.checkpoint import open_checkpoint
from quantplug.config import DENSE, resolve_config
from quantplug.convert import convert
from quantplug.entries import path_entries
from quantplug.errors import CheckpointError
from quantplug.inventory import architecture_of, inventory_of
from quantplug.load import load_layers
from quantplug.names import GENERIC
from quantplug.planner import plan
from quantplug.plugins import registry as installed
from quantplug.renames import NameMap, Rename
from quantplug.schemes import SchemeCache
from quantplug.shards import shards_of
from quantplug_architectures import plugin

ALL = {**FAMILIES, **DENSE_FAMILIES}


def modules_of(directory):
    config = json.loads((directory / "config.json").read_text())
    return {m.name: m for m in inventory_of(open_checkpoint(directory), config, installed(), DENSE)}


def with_next_layer(tiny, directory):
    """Write a model with the layer that drafts, as GLM-4's and DeepSeek's files carry it after the last one."""
    last, here = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    state = dict(tiny.state)
    state |= {here + name.removeprefix(last): tensor.clone() for name, tensor in state.items() if name.startswith(last)}
    embedding, norm = state["model.embed_tokens.weight"], state["model.norm.weight"]
    state[f"{here}embed_tokens.weight"] = embedding.clone()
    state[f"{here}shared_head.head.weight"] = embedding.clone()
    state[f"{here}eh_proj.weight"] = torch.ones(embedding.shape[1], 2 * embedding.shape[1], dtype=torch.bfloat16)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        state[f"{here}{name}.weight"] = norm.clone()
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(tiny.config))


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_layer_that_drafts_has_an_embedding_and_a_head_of_its_own(family, models, tmp_path):
    """They are what they are in the model itself; the model's own head is the last module all the same."""
    with_next_layer(models(family)[0], tmp_path)
    modules = modules_of(tmp_path)
    here = f"model.layers.{LAYERS}"
    kinds = {
        name.removeprefix(f"{here}."): (m.kind, m.head)
        for name, m in modules.items()
        if name.startswith(f"{here}.") and not name.startswith((f"{here}.mlp", f"{here}.self_attn"))
    }
    assert kinds == {
        "embed_tokens": ("embedding", False), "enorm": ("other", False), "hnorm": ("other", False),
        "eh_proj": ("linear", False), "shared_head.head": ("linear", True), "shared_head.norm": ("other", False),
        "input_layernorm": ("other", False), "post_attention_layernorm": ("other", False),
    }  # fmt: skip
    assert modules[f"{here}.mlp.experts"].experts.count == EXPERTS
    assert list(modules)[-1] == "lm_head"
    assert modules["lm_head"].head


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_tied_head_is_there_beside_that_of_a_layer_that_drafts(family, models, tmp_path):
    """Else the model would have no head."""
    tiny, _ = models(family)
    with_next_layer(tiny, tmp_path)
    state = {name: t for name, t in tiny.state.items() if name != "lm_head.weight"}
    state[f"model.layers.{LAYERS}.shared_head.head.weight"] = tiny.state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**tiny.config, "tie_word_embeddings": True}))
    head = modules_of(tmp_path)["lm_head"]
    assert (head.head, head.tied_to) == (True, "model.embed_tokens")


def test_embeddings_of_every_layer_are_embeddings(models, tmp_path):
    """Gemma 4 has a second vocabulary table, which a linear layer's scheme must never get."""
    tiny, _ = models("gemma4")
    table = {"model.embed_tokens_per_layer.weight": torch.zeros(96, 32, dtype=torch.bfloat16)}
    save_file({**tiny.state, **table}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny.config))
    assert modules_of(tmp_path)["model.embed_tokens_per_layer"].kind == "embedding"


def test_values_that_are_keys_stand_in_for_a_shard_that_is_not_stored(models):
    """Layer 1 of this Gemma 4 has no v_proj; no other family may leave one out."""
    tiny, _ = models("gemma4")
    stored = {name.rpartition(".")[0] for name in tiny.state}
    rules = architecture_of(tiny.config, installed())
    of = {layer: shards_of(f"model.layers.{layer}.self_attn.qkv_proj", stored, rules) for layer in (0, 1)}
    assert [[path.rpartition(".")[2] for path in paths] for paths in of.values()] == [
        ["q_proj", "k_proj", "v_proj"], ["q_proj", "k_proj", "k_proj"],
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj") as caught:
        shards_of("model.layers.1.self_attn.qkv_proj", stored, GENERIC)
    assert caught.value.code == "QP-ST-MISSING"


def test_projections_of_latents_are_fused_as_engines_call_them(models):
    """DeepSeek's first projections of queries and of keys and values."""
    tiny, _ = models("deepseek_v3")
    stored = {name.rpartition(".")[0] for name in tiny.state}
    rules = architecture_of(tiny.config, installed())
    for fused in ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"):
        shards = shards_of(f"model.layers.0.self_attn.{fused}", stored, rules)
        assert [shard.rpartition(".")[2] for shard in shards] == ["q_a_proj", "kv_a_proj_with_mqa"]


@pytest.mark.parametrize("family", ALL)
def test_renamed_modules_are_those_of_the_model(family, models):
    """Every stored tensor that Transformers takes as it is, and every container, under the model's own name."""
    tiny, _ = models(family)
    names = architecture_of(tiny.config, installed()).renames
    parameters, modules = tiny.model.state_dict(), dict(tiny.model.named_modules())
    for container in tiny.experts:
        assert names(container) in modules
    for name in tiny.others:
        assert names(name) in parameters
        assert names(names(name)) == names(name)


VLLM_GEMMA4 = NameMap((Rename("experts", "moe.experts"),))


@pytest.mark.parametrize(("family", "parent"), [("mixtral", "mlp"), ("gemma4", "moe")])
def test_an_engine_calls_modules_by_its_own_names(family, parent, models, tmp_path):
    """Rules are asked, and tensors read, under the checkpoint's names; layers come under the engine's."""
    tiny, source = models(family)
    directory = tmp_path / "converted"
    convert(source, directory, scheme="mxfp8", params={}, skip=tuple(path_entries(["model.layers.1"], "test")))
    registry = installed()
    config = resolve_config(directory, registry)
    rules = architecture_of(tiny.config, registry)
    names = VLLM_GEMMA4 if family == "gemma4" else rules.renames
    inventory = inventory_of(open_checkpoint(directory), tiny.config, registry, config, names)
    made = plan(directory, inventory=inventory, dtype="float32", policy=REFERENCE)
    assert not made.left
    loaded = load_layers(made, directory)
    assert list(loaded.experts) == [f"model.layers.0.{parent}.experts"]  # layer 1 stays whole, by the file's own names
    first = loaded.experts[f"model.layers.0.{parent}.experts"].segments_of(0)[0]
    assert first.name.startswith(f"{next(iter(tiny.experts))}.0.")


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_dense_families_are_found_and_plan(family, models):
    """Linear layers, one embedding, one head."""
    tiny, directory = models(family)
    assert architecture_of(tiny.config, installed()).name == family
    made = plan(directory, platform="cpu")
    assert {layer.kind for layer in made.layers} == {"linear", "embedding", "other"}
    assert not made.left


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_holds_what_its_experts_round_to(family, models, tmp_path):
    """Stacked ones are written apart; every expert is its dense weight, rounded; the router stays dense."""
    tiny, directory = models(family)
    target = tmp_path / "converted"
    convert(directory, target, scheme="mxfp8", params={})
    made = plan(target, dtype="float32", policy=REFERENCE)
    loaded = load_layers(made, target)
    scheme = SchemeCache(installed()).get(resolve_config(target, installed()).default, "test")
    assert list(loaded.experts) == list(tiny.experts)
    for container, experts in tiny.experts.items():
        for number, expert in enumerate(experts):
            w13, w2 = loaded.experts[container].dequantize(number)
            assert torch.equal(w13, scheme.quantize(torch.cat([expert.gate, expert.up])).dequantize())
            assert torch.equal(w2, scheme.quantize(expert.down).dequantize())
    routers = [layer for layer in made.layers if layer.path.endswith((".gate", ".router", ".router.proj"))]
    assert len(routers) >= LAYERS
    assert not any(layer.quantized for layer in routers)


def test_a_family_is_a_short_file_of_data():
    """Every one: a value of Architecture, no function of its own."""
    families = plugin.quantplug_architectures()
    assert len({family.name for family in families}) == len(families)
    for file in Path(plugin.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) < 50
        assert file.name == "plugin.py" or "def " not in text
