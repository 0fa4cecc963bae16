"""Calibration statistics: those that the whole model would see, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import config_of, write_dense, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantplug.errors import ConvertError
from quantplug_transformers import decoder
from quantplug_transformers.host import TransformersHost

if TYPE_CHECKING:
    from collections.abc import Collection

TEXT = "The quick brown fox jumps over the lazy dog, again and again and again, until it is tired of it."
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2},
}


def source_of(family: str, directory, dtype: torch.dtype = torch.float32):
    config = config_of(family, vocab_size=259, max_position_embeddings=64, **FAMILIES[family])
    write_dense(directory, config, dtype)
    write_tokenizer(directory, chat=False)
    return directory


def inputs_of(directory, windows: int, window: int, batch: int) -> dict[str, list[torch.Tensor]]:
    """Return what enters each linear layer of the whole model, by module path."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"][: windows * window]
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, p=path: seen.setdefault(p, []).append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for pieces in torch.tensor(ids).view(windows, window).split(batch):
            model(pieces, use_cache=False)
    return seen


def stored_path(family: str, path: str, found: Collection[str]) -> str:
    """Return how the checkpoint of a family calls a module; older versions of Transformers rename less."""
    other = {"mixtral": (".mlp.", ".block_sparse_moe."), "gpt_neox": ("lm_head", "embed_out")}.get(family, ("", ""))
    return path if path in found else path.replace(*other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("together", [1, 1024])
def test_statistics_are_those_of_the_whole_model(family, together, dtype, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decoder, "_TOKENS", together)
    source = source_of(family, tmp_path, dtype)
    blocks = list(TransformersHost().calibrate(source, TEXT, tokens=24 * 3 + 5, window=24))
    assert len(blocks) == 3
    found = {path: hessian for block in blocks for path, hessian in block.hessians.items()}
    wanted = inputs_of(source, windows=3, window=24, batch=3 if together > 24 else 1)
    assert found.keys() == {stored_path(family, path, found) for path in wanted}
    for path, states in wanted.items():
        rows = torch.cat(states).double()
        # A float32 sum of n products is off by at most n ulps of the sum of their magnitudes; three windows are added.
        bound = (len(rows) + 3) * torch.finfo(torch.float32).eps * (rows.abs().T @ rows.abs())
        error = (found[stored_path(family, path, found)].double() - rows.T @ rows).abs()
        assert bool((error <= bound).all()), path


def test_layers_with_one_input_share_one_tensor(tmp_path) -> None:
    block = next(TransformersHost().calibrate(source_of("llama", tmp_path), TEXT, tokens=48, window=24))
    path = "model.layers.0"
    query, key, value = (block.hessians[f"{path}.self_attn.{n}_proj"] for n in "qkv")
    assert query is key is value
    assert block.hessians[f"{path}.mlp.gate_proj"] is block.hessians[f"{path}.mlp.up_proj"]
    assert block.hessians[f"{path}.self_attn.o_proj"] is not query


def test_replaced_weights_are_what_later_blocks_see(tmp_path) -> None:
    source = source_of("llama", tmp_path)
    untouched = list(TransformersHost().calibrate(source, TEXT, tokens=48, window=24))
    found = []
    for number, block in enumerate(TransformersHost().calibrate(source, TEXT, tokens=48, window=24)):
        found.append({path: hessian.clone() for path, hessian in block.hessians.items()})
        if number == 0:
            block.replace("model.layers.0.mlp.down_proj", torch.zeros(64, 96))
    assert torch.equal(found[0]["model.layers.0.mlp.down_proj"], untouched[0].hessians["model.layers.0.mlp.down_proj"])
    for number in (1, 2):
        for path, hessian in untouched[number].hessians.items():
            assert not torch.equal(found[number][path], hessian)


def test_the_head_comes_last_and_replacing_it_leaves_the_embedding_it_was_tied_to(tmp_path) -> None:
    blocks = list(TransformersHost().calibrate(source_of("llama", tmp_path), TEXT, tokens=48, window=24))
    assert list(blocks[-1].hessians) == ["lm_head"]
    head = blocks[-1]._modules["lm_head"]
    before = head.weight.clone()
    embedding = head.weight
    blocks[-1].replace("lm_head", torch.zeros(259, 64))
    assert not head.weight.any()
    assert torch.equal(embedding, before)


@pytest.mark.parametrize(("tokens", "window"), [(23, 24), (1000, 1000), (0, 24), (24, 0)])
def test_a_text_that_fills_no_window_is_refused(tokens, window, tmp_path) -> None:
    with pytest.raises(ConvertError) as caught:
        TransformersHost().calibrate(source_of("llama", tmp_path), TEXT, tokens=tokens, window=window)
    assert caught.value.code == "QP-CONV-CALIBRATION"
    assert "at least one window" in caught.value.expected


def test_a_model_without_blocks_is_refused() -> None:
    from quantplug_transformers.decoder import Decoder

    with pytest.raises(ConvertError, match="no row of equal blocks") as caught:
        Decoder(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert caught.value.code == "QP-CONV-CALIBRATION"
