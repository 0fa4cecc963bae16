"""
A loaded model that generates text and is scored on text.
"""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from quantplug.errors import HostError
from quantplug.host import RunningModel
from quantplug_transformers.text import TextStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantplug.plan import Plan

# Rows of logits that are turned into float32 at a time: at 256,000 words they take 64 MB.
_ROWS = 64


class TransformersModel(RunningModel):
    """A `PreTrainedModel` and its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._plan = plan
        # Without it a prompt's logits over the whole vocabulary are computed to look at the last row. An index rather
        # than a number of rows, because what a number slices off is multiplied ten times more slowly on the CPU.
        takes = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_row = {"logits_to_keep": torch.tensor([-1], device=model.device)} if takes else {}

    @property
    def model(self) -> PreTrainedModel:
        """The `PreTrainedModel`."""
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside it."""
        return self._tokenizer

    @property
    def plan(self) -> Plan:
        """The plan it was loaded by."""
        return self._plan

    def stream(self, prompt: str, *, max_new_tokens: int, chat: bool = True) -> Iterator[str]:
        """
        Generate greedily and yield the text piece by piece, one piece per token (possibly empty).

        Nothing runs between two pieces: who stops asking stops the generation. Sampling settings and penalties of the
        checkpoint's generation configuration are not applied.

        Args:
            prompt: the user's words.
            max_new_tokens: upper bound; the end token and the model's longest sequence end it, too.
            chat: whether the chat template is applied, if there is one.

        Raises:
            HostError: `QP-HOST-INPUT` when the prompt is empty or longer than the model can see.
        """
        tokens = self._prompt_tokens(prompt, chat=chat)
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise HostError("QP-HOST-INPUT", "max_new_tokens", repr(max_new_tokens), expected="a number from 1")
        longest = self._longest()
        if len(tokens) >= longest:
            raise HostError(
                "QP-HOST-INPUT",
                "prompt",
                f"is {len(tokens)} tokens long",
                expected=f"fewer than {longest}, which is all that the model can see",
                fix="Shorten it.",
            )
        return self._generate(tokens, min(max_new_tokens, longest - len(tokens)))

    def perplexity(self, text: str, *, window: int = 512) -> float:
        """
        Return exp of the mean negative log-likelihood per token of `text`.

        The tokens, without any that a tokenizer adds, are cut into consecutive windows of `window`, the last one
        shorter; each is scored on its own, its first token not at all.

        Raises:
            HostError: `QP-HOST-INPUT` when the text is shorter than two tokens, or a window longer than the model can
                see.
        """
        if type(window) is not int or not 2 <= window <= self._longest():
            raise HostError("QP-HOST-INPUT", "window", repr(window), expected=f"2 to {self._longest()} tokens")
        tokens = self._tokens(text)
        pieces = [piece for piece in torch.tensor(tokens).split(window) if len(piece) > 1]
        if not pieces:
            raise HostError("QP-HOST-INPUT", "text", f"is {len(tokens)} token(s) long", expected="at least 2")
        loss = sum(self._negative_log_likelihood(piece.to(self._model.device)) for piece in pieces)
        return math.exp(loss / sum(len(piece) - 1 for piece in pieces))

    def _generate(self, tokens: list[int], count: int) -> Iterator[str]:
        stream, ends = TextStream(self._tokenizer), self._end_tokens()
        ids = torch.tensor([tokens], device=self._model.device)
        cache, rows = None, self._last_row
        for left in reversed(range(count)):
            with torch.inference_mode():
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **rows)
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
            rows = {}
            cache, token = output.past_key_values, int(ids)
            if token in ends:
                yield stream.flush()
                return
            piece = stream.push(token)
            yield piece if left else piece + stream.flush()

    @torch.inference_mode()
    def _negative_log_likelihood(self, tokens: torch.Tensor) -> float:
        logits = self._model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        parts = zip(logits.split(_ROWS), tokens[1:].split(_ROWS), strict=True)
        return sum(float(torch.nn.functional.cross_entropy(a.float(), b, reduction="sum")) for a, b in parts)

    def _prompt_tokens(self, prompt: str, *, chat: bool) -> list[int]:
        if not isinstance(prompt, str) or not prompt:
            raise HostError("QP-HOST-INPUT", "prompt", "is empty", expected="some words")
        if not (chat and self._tokenizer.chat_template):
            return self._tokens(prompt, special=True)
        said = [{"role": "user", "content": prompt}]
        return self._tokens(str(self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)))

    def _tokens(self, text: str, *, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _longest(self) -> int:
        return int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        return {token for token in (*listed, self._tokenizer.eos_token_id) if token is not None}


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Keep Transformers from drawing progress bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
