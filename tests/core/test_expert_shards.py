"""
What a fused module of an engine is stored as, where a family leaves shards out.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from toy_checkpoints import toy_registry

from quantplug.errors import CheckpointError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.load import load_layers
from quantplug.names import GENERIC, Architecture
from quantplug.planner import plan
from quantplug.shards import shards_of
from quantplug_testkit import toys

SHARED_KV = Architecture("shared", absent=(("v_proj", "k_proj"),))


def attention(*names):
    return {f"model.layers.0.self_attn.{name}" for name in names}


@pytest.mark.parametrize("rules", [GENERIC, SHARED_KV])
def test_stored_shards_are_taken_in_order(rules):
    """A shard that is stored counts, whatever could stand in for it."""
    stored = attention("v_proj", "k_proj", "q_proj", "o_proj")
    assert shards_of("model.layers.0.self_attn.qkv_proj", stored, rules) == tuple(
        f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")
    )
    assert shards_of("model.layers.0.self_attn.o_proj", stored, rules) == ("model.layers.0.self_attn.o_proj",)


def test_an_absent_shard_is_another_one_by_rule():
    """Gemma 4's layers whose values are their keys: the key projection is there twice."""
    shards = shards_of("model.layers.0.self_attn.qkv_proj", attention("q_proj", "k_proj"), SHARED_KV)
    assert [shard.rpartition(".")[2] for shard in shards] == ["q_proj", "k_proj", "k_proj"]


def test_a_module_that_is_stored_fused_is_itself():
    """Some writers fuse on their own."""
    stored = attention("qkv_proj", "q_proj")
    assert shards_of("model.layers.0.self_attn.qkv_proj", stored, GENERIC) == ("model.layers.0.self_attn.qkv_proj",)


@pytest.mark.parametrize(
    ("rules", "names", "lacking"),
    [(GENERIC, ["q_proj", "k_proj"], "v_proj"), (SHARED_KV, ["q_proj", "v_proj"], "k_proj"), (SHARED_KV, [], "k_proj")],
)
def test_a_shard_that_is_absent_without_a_rule_is_an_error(rules, names, lacking):
    """It says which shard, and that no rule of the family allows it."""
    with pytest.raises(
        CheckpointError, match=rf"no tensors for .*self_attn\.{lacking}.*rule of family {rules.name}"
    ) as e:
        shards_of("model.layers.0.self_attn.qkv_proj", attention(*names), rules)
    assert e.value.code == "QP-ST-MISSING"


def test_a_shard_that_is_there_twice_is_loaded_twice(tmp_path):
    """One stored tensor, two segments of one module: no tensor is claimed by two."""
    scheme = toys.ToyScheme.build({}, "test")
    generator = torch.Generator().manual_seed(3)
    dense = {name: torch.randn(rows, 32, generator=generator) for name, rows in (("q_proj", 24), ("k_proj", 8))}
    stored = {
        f"attn.{name}.{suffix}": tensor
        for name, weight in dense.items()
        for suffix, tensor in scheme.encode(scheme.quantize(weight)).items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "toy"}}))
    shards = shards_of("attn.qkv_proj", {"attn.q_proj", "attn.k_proj"}, SHARED_KV)
    inventory = Inventory((ModuleInfo("attn.qkv_proj", "linear", class_name="Linear", shards=shards),))
    registry = toy_registry()
    made = plan(tmp_path, inventory=inventory, registry=registry, dtype="float32")
    assert [segment.name for segment in made.layers[0].segments] == ["attn.q_proj", "attn.k_proj", "attn.k_proj"]
    values = load_layers(made, tmp_path, registry=registry).modules["attn.qkv_proj"].dequantize(torch.float32)
    assert values.shape == (40, 32)
    torch.testing.assert_close(values[24:32], values[32:], rtol=0, atol=0)
    torch.testing.assert_close(values[:24], scheme.quantize(dense["q_proj"]).dequantize(), rtol=0, atol=0)
