"""The host: streaming text, scoring text, and what it asks of a checkpoint."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import config_of, dequantized, quantize, write_dense, write_tokenizer
from transformers import AutoTokenizer

from quantplug.api import load
from quantplug.errors import HostError, QuantplugError
from quantplug.plugins import build_registry
from quantplug_gptq import plugin as gptq
from quantplug_transformers import plugin
from quantplug_transformers.text import TextStream

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "Ärger, größer als gedacht: 日本語 and some plain words 🙂 to end with."


@pytest.fixture(scope="module")
def hosted():
    return build_registry({"quantplug-gptq": gptq, "quantplug-transformers": plugin})


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes and a chat template."""
    base = tmp_path_factory.mktemp("chatty")
    dense = write_dense(base / "dense", config_of("llama", vocab_size=259, max_position_embeddings=64))
    write_tokenizer(dense)
    return quantize(dense, base / "source")


@pytest.fixture(scope="module")
def running(chatty, hosted):
    return load(chatty, dtype="float32", registry=hosted)


@pytest.fixture(scope="module")
def dense_model(chatty, tmp_path_factory):
    return dequantized(chatty, tmp_path_factory.mktemp("host") / "dense")


def greedy(model, tokenizer, text: str, count: int) -> list[int]:
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    found = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def test_load_gives_the_model_the_plan_and_the_tokenizer(running, chatty) -> None:
    assert type(running.model).__name__ == "LlamaForCausalLM"
    assert running.plan == running.model.quantplug_plan
    assert running.tokenizer.chat_template
    assert running.model.quantplug_report.kernels == {"reference": 14}


@pytest.mark.parametrize("chat", [True, False])
def test_stream_yields_one_piece_per_token_of_what_generate_gives(chat, running, dense_model) -> None:
    tokenizer = running.tokenizer
    prompt = "[user]Hi[assistant]" if chat else "Hi"
    wanted = greedy(dense_model, tokenizer, prompt, 12)
    pieces = list(running.stream("Hi", max_new_tokens=12, chat=chat))
    assert len(pieces) == len(wanted)
    assert "".join(pieces) == tokenizer.decode(wanted, skip_special_tokens=True)


def test_stream_ends_at_the_end_token(running, dense_model, monkeypatch) -> None:
    wanted = greedy(dense_model, running.tokenizer, "Hi", 12)
    stop = wanted[4]
    monkeypatch.setattr(running.model.generation_config, "eos_token_id", [stop, 1])
    pieces = list(running.stream("Hi", max_new_tokens=12, chat=False))
    end = wanted.index(stop)
    assert len(pieces) == end + 1
    assert "".join(pieces) == running.tokenizer.decode(wanted[:end], skip_special_tokens=True)


def test_stream_ends_where_the_model_can_see_no_further(running) -> None:
    pieces = list(running.stream("x" * 60, max_new_tokens=100, chat=False))
    assert len(pieces) <= 4


def test_stream_can_be_left_and_begun_again(running) -> None:
    first = running.stream("Hi", max_new_tokens=12)
    begun = [next(first), next(first)]
    first.close()
    assert not torch.is_inference_mode_enabled()
    assert [*running.stream("Hi", max_new_tokens=12)][:2] == begun


def test_nothing_runs_between_two_pieces(running, monkeypatch) -> None:
    calls = []
    forward = running.model.forward
    monkeypatch.setattr(running.model, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    stream = running.stream("Hi", max_new_tokens=12)
    assert calls == []
    next(stream)
    assert len(calls) == 1
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "count", "words"),
    [
        ("", 5, "prompt: is empty"),
        (None, 5, "prompt: is empty"),
        ("x" * 64, 5, "prompt: is 64 tokens long; expected fewer than 64"),
        ("Hi", 0, "max_new_tokens: 0"),
        ("Hi", True, "max_new_tokens: True"),
        ("Hi", "5", "max_new_tokens: '5'"),
    ],
)
def test_malformed_requests_are_refused_before_anything_runs(prompt, count, words, running) -> None:
    with pytest.raises(HostError) as caught:
        running.stream(prompt, max_new_tokens=count, chat=False)
    assert caught.value.code == "QP-HOST-INPUT"
    assert words in str(caught.value)
    assert list(running.stream("Hi", max_new_tokens=1))


def test_perplexity_is_that_of_the_windows(running, dense_model) -> None:
    tokens = running.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    window = 16
    assert len(tokens) % window > 1
    losses = []
    for start in range(0, len(tokens), window):
        piece = torch.tensor(tokens[start : start + window])
        with torch.no_grad():
            logits = dense_model(piece[None]).logits[0]
        losses += [-logits[i].log_softmax(-1)[piece[i + 1]].item() for i in range(len(piece) - 1)]
    # Both sum the same float32 values in another order: each sum of n terms is off by at most n ulps of itself.
    bound = 4 * len(losses) * torch.finfo(torch.float32).eps
    wanted = math.exp(math.fsum(losses) / len(losses))
    assert running.perplexity(TEXT, window=window) == pytest.approx(wanted, rel=bound * abs(math.log(wanted)) + bound)


@pytest.mark.parametrize(("text", "window"), [("", 8), ("x", 8), ("xyz", 1), ("xyz", 65), ("xyz", True)])
def test_texts_and_windows_that_cannot_be_scored_are_refused(text, window, running) -> None:
    with pytest.raises(HostError) as caught:
        running.perplexity(text, window=window)
    assert caught.value.code == "QP-HOST-INPUT"


def test_a_checkpoint_without_tokenizer_or_template(chatty, hosted, tmp_path) -> None:
    plain = shutil.copytree(chatty, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    running = load(plain, registry=hosted)
    assert list(running.stream("Hi", max_new_tokens=3)) == list(running.stream("Hi", max_new_tokens=3, chat=False))
    (plain / "tokenizer.json").write_text("{}")
    with pytest.raises(QuantplugError, match="cannot read its tokenizer") as caught:
        load(plain, registry=hosted)
    assert caught.value.code == "QP-HOST-TOKENIZER"
    for file in plain.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(QuantplugError, match="holds no tokenizer") as caught:
        load(plain, registry=hosted)
    assert caught.value.code == "QP-HOST-TOKENIZER"


def test_dense_checkpoints_run_too(chatty, hosted, tmp_path) -> None:
    dense = write_dense(tmp_path / "dense", config_of("llama", vocab_size=259))
    write_tokenizer(dense, chat=False)
    running = load(dense, registry=hosted)
    assert running.plan.dialect == ""
    assert len(list(running.stream("Hi", max_new_tokens=3))) <= 3


def test_pieces_of_text_join_to_the_text_of_all_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(TEXT)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == TEXT
    assert stream.flush() == ""
    assert len(pieces) == len(TEXT.encode())
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_half_a_character_is_held_back_and_comes_out_at_the_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("a🙂")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in tokens] == ["a", "", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push(tokenizer("b")["input_ids"][0]) == "b"
