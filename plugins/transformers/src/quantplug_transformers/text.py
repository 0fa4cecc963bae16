"""
Tokens as text, piece by piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """
    Turns tokens into text as they come, so that the pieces joined are the text of all tokens.

    A token may hold part of a character, and a tokenizer may treat the start of a text in its own way. So each token is
    decoded together with the ones of the piece before, and what is new is held back while it ends in half a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._known = ""

    def push(self, token: int) -> str:
        """Return the text that became certain with this token, possibly ""."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith(_UNFINISHED) or len(text) <= len(self._known):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        return self._take(self._decode(self._context + self._pending))

    def _take(self, text: str) -> str:
        piece = text[len(self._known) :]
        self._context, self._pending = self._pending, []
        self._known = self._decode(self._context)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
