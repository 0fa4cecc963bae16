"""Every family: names and sizes off the model, the same numbers as dense, the same files when saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import config_of, dequantized, quantize, stored_tensors, write_dense
from transformers import AutoModelForCausalLM

from quantplug.planner import plan as make_plan
from quantplug.spec import LinearShape
from quantplug_transformers import from_pretrained
from quantplug_transformers.inventory import read_inventory
from quantplug_transformers.names import match_names

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.registry import Registry

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": ({}, 7),
    "qwen2": ({}, 7),
    "qwen3": ({"head_dim": 16}, 7),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 16}, 7),
    "phi3": ({}, 4),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, 6),
    "gpt_neox": ({}, 4),
    "falcon": ({}, 4),
    "mixtral": ({"num_local_experts": 4}, 4),
    "qwen3_moe": (EXPERTS, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_gives_the_numbers_of_its_dense_self_and_saves_what_it_read(
    family: str, tmp_path: Path, registry: Registry, ids: torch.Tensor
) -> None:
    fields, layers = FAMILIES[family]
    dense = write_dense(tmp_path / "dense", config_of(family, **fields))
    # A router is a linear layer too, and no quantizer touches it.
    source = quantize(dense, tmp_path / "source", keep=lambda path: path.endswith(".gate"))
    single = from_pretrained(source, dtype="float32", registry=registry)
    assert sum(layer.quantized for layer in single.quantplug_plan.layers) == 2 * layers
    # In float32 the reference kernel multiplies with the very operator a dense layer has.
    assert torch.equal(single(ids).logits, dequantized(source, tmp_path / "dequantized")(ids).logits)
    model = from_pretrained(source, registry=registry)
    model.save_pretrained(tmp_path / "saved")
    wanted, written = stored_tensors(source), stored_tensors(tmp_path / "saved")
    assert wanted.keys() == written.keys()
    assert all(t.dtype == written[n].dtype and torch.equal(t, written[n]) for n, t in wanted.items())
    again = from_pretrained(tmp_path / "saved", registry=registry)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_inventory_says_kind_size_bias_class_tie_and_head(tmp_path: Path) -> None:
    config = config_of("qwen2", num_hidden_layers=1, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    inventory = {module.path: module for module in read_inventory(model, match_names(model, []))}
    assert list(inventory) == [
        "model.embed_tokens",
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.norm",
        "lm_head",
    ]
    query = inventory["model.layers.0.self_attn.k_proj"]
    assert (query.kind, query.class_name, query.shape, query.bias) == ("linear", "Linear", LinearShape(32, 64), True)
    assert not inventory["model.layers.0.self_attn.o_proj"].bias
    assert inventory["model.embed_tokens"].kind == "embedding"
    assert inventory["model.norm"].kind == "other"
    head = inventory["lm_head"]
    assert (head.kind, head.tied_to, head.head) == ("linear", "model.embed_tokens", True)


def test_inventory_names_modules_as_the_checkpoint_does(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("mixtral", num_local_experts=2, num_hidden_layers=1))
    block = "model.layers.0.block_sparse_moe"
    stored = [f"{block}.gate.weight", *(f"{block}.experts.{e}.{w}.weight" for e in (0, 1) for w in ("w1", "w2", "w3"))]
    stored += ["model.layers.0.self_attn.q_proj.qweight", "nobody.knows.weight"]
    names = match_names(model, stored)
    inventory = {module.path: module for module in read_inventory(model, names)}
    assert inventory["model.layers.0.self_attn.q_proj"].name == "model.layers.0.self_attn.q_proj"
    assert inventory["model.layers.0.mlp.gate"].name == f"{block}.gate"
    experts = inventory["model.layers.0.mlp.experts"]
    assert experts.kind == "other"
    assert set(experts.shards) == {f"{block}.experts.{e}.{w}" for e in (0, 1) for w in ("w1", "w2", "w3")}
    assert "nobody.knows.weight" not in names.targets
    assert "model.layers.0.self_attn.q_proj.qweight" not in names.targets


def test_checkpoint_of_the_base_model_gets_the_names_of_the_whole_one(
    tmp_path: Path, registry: Registry, ids: torch.Tensor
) -> None:
    from safetensors.torch import load_file, save_file

    dense = write_dense(tmp_path / "dense", config_of("llama", tie_word_embeddings=True))
    source = quantize(dense, tmp_path / "source")
    expected = from_pretrained(source, registry=registry)(ids).logits
    file = source / "model.safetensors"
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    model = from_pretrained(source, registry=registry)
    assert torch.equal(model(ids).logits, expected)
    assert model.quantplug_plan.layer("model.layers.0.mlp.up_proj").segments[0].name == "layers.0.mlp.up_proj"
    # A plan made without the model calls the layers as the files do.
    plan = make_plan(source, registry=registry)
    assert plan.layer("layers.0.mlp.up_proj").quantized
    planned = from_pretrained(source, plan=plan, registry=registry)
    assert torch.equal(planned(ids).logits, expected)
    assert planned.quantplug_plan.layer("model.layers.0.mlp.up_proj").quantized
