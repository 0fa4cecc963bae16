"""
The blocks of a decoder, run one by one and apart from the rest of the model.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantplug.errors import ConvertError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


# Tokens that go through a block at a time: enough for large products, few enough to need little memory.
_TOKENS = 1024


class _Call(NamedTuple):
    """What the model passes to a block beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Decoder:
    """
    A model whose blocks can be called with hidden states only.

    How the model calls each block (masks, positions) is learnt once and holds for all texts of that length.

    Raises:
        ConvertError: `QP-CONV-CALIBRATION` when the model has no row of equal blocks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.prefix, self.blocks = _row_of_blocks(model)
        self._base: Any = model.base_model
        self._calls: dict[int, list[_Call]] = {}
        self._returned = 0
        """How many things a block returns as a tuple; 0 when it returns the hidden states themselves."""

    @staticmethod
    def batches(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut windows `[B, window]` into batches of about a thousand tokens."""
        return torch.split(windows, max(1, _TOKENS // windows.shape[1]))

    @torch.no_grad()
    def enter(self, batch: torch.Tensor) -> torch.Tensor:
        """Return what enters the first block, `[b, window, hidden]`, for a batch of windows `[b, window]`."""
        calls: list[_Call] = []
        entering: list[torch.Tensor] = []

        def learn(index: int, states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            calls.append(_Call(arguments, keywords))
            if index > 0:
                return self._answer(states)
            entering.append(states)
            if batch.shape[0] not in self._calls:
                result = type(self.blocks[0]).forward(self.blocks[0], states, *arguments, **keywords)
                self._returned = len(result) if isinstance(result, tuple) else 0
            return self._answer(states)

        self._run(batch, learn)
        self._calls[batch.shape[0]] = calls
        return entering[0]

    @torch.no_grad()
    def run_block(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return what a block makes of the hidden states of a batch."""
        call = self._calls[states.shape[0]][index]
        result = self.blocks[index](states, *call.arguments, **call.keywords)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    @torch.no_grad()
    def leave(self, batch: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return what the output head sees of the states that come out of the last block."""

        def put(index: int, entering: torch.Tensor, *_: Any, **__: Any) -> Any:
            return self._answer(states if index == 0 else entering)

        output: torch.Tensor = self._run(batch, put).last_hidden_state
        return output

    def _run(self, batch: torch.Tensor, forward: Callable[..., Any]) -> Any:
        with _forward_by(self.blocks, forward):
            return self._base(input_ids=batch, use_cache=False)

    def _answer(self, states: torch.Tensor) -> Any:
        return (states,) * self._returned if self._returned else states


@contextmanager
def _forward_by(blocks: torch.nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Let every block answer by `forward(index, …)` for a while."""

    def bound(index: int) -> Callable[..., Any]:
        return lambda *arguments, **keywords: forward(index, *arguments, **keywords)

    for index, block in enumerate(blocks):
        block.forward = bound(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _row_of_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Return the longest row of modules of one class, with its path."""
    rows = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    # Experts and the like are rows within a block.
    outer = [(path, row) for path, row in rows if not any(path.startswith(f"{other}.") for other, _ in rows)]
    if not outer:
        raise ConvertError(
            "QP-CONV-CALIBRATION",
            type(model).__name__,
            "has no row of equal blocks to go through one by one",
            expected="a decoder that is a ModuleList of blocks",
            fix="Convert it without a calibration text.",
        )
    return max(outer, key=lambda item: len(item[1]))
