"""Calibration statistics: those that the whole model would see, block by block."""

from __future__ import annotations

import pytest
import torch
from tiny_models import config_of, write_dense, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantplug.errors import ConvertError
from quantplug_transformers.host import TransformersHost

TEXT = "The quick brown fox jumps over the lazy dog, again and again and again, until it is tired of it."
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2},
}


def source_of(family: str, directory):
    config = config_of(family, vocab_size=259, max_position_embeddings=64, **FAMILIES[family])
    write_dense(directory, config, torch.float32)
    write_tokenizer(directory, chat=False)
    return directory


def inputs_of(directory, windows: int, window: int) -> dict[str, list[torch.Tensor]]:
    """Return what enters each linear layer of the whole float32 model, by module path."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"][: windows * window]
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, p=path: seen.setdefault(p, []).append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for piece in torch.tensor(ids).view(windows, window):
            model(piece[None], use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(family, tmp_path) -> None:
    source = source_of(family, tmp_path)
    wanted = inputs_of(source, windows=3, window=24)
    blocks = list(TransformersHost().calibrate(source, TEXT, tokens=24 * 3 + 5, window=24))
    assert len(blocks) == 3
    found = {path: hessian for block in blocks for path, hessian in block.hessians.items()}
    stored = {path.replace(".mlp.gate", ".block_sparse_moe.gate") if family == "mixtral" else path for path in wanted}
    if family == "gpt_neox" and "embed_out" in found:
        stored = {path.replace("lm_head", "embed_out") for path in stored}
    assert found.keys() == stored
    for path, states in wanted.items():
        name = next(n for n in found if n.split(".")[-1] == path.split(".")[-1] or n in ("embed_out", "lm_head"))
        name = path if path in found else name
        rows = torch.cat(states).double()
        exact = rows.T @ rows
        # A float32 sum of n products is off by at most n ulps of the sum of their magnitudes; three windows are added.
        bound = (len(rows) + 3) * torch.finfo(torch.float32).eps * (rows.abs().T @ rows.abs())
        assert bool(((found[name].double() - exact).abs() <= bound + 1e-30).all()), path


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
