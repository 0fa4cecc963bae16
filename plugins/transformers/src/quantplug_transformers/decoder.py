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


class _Call(NamedTuple):
    """How the model calls a block beside the hidden states, and how many things the block returns (0: no tuple)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    returned: int


class Decoder:
    """
    A model whose blocks can be called with hidden states only.

    How the model calls each block (masks, positions) is learnt from one window and holds for all of that length.

    Raises:
        ConvertError: `QP-CONV-CALIBRATION` when the model has no row of equal blocks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.prefix, self.blocks = _row_of_blocks(model)
        self._base: Any = model.base_model
        self._dtype = model.dtype
        self._calls: list[_Call] = []

    @torch.no_grad()
    def enter(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Return what enters the first block, float32 `[1, window, hidden]` for each row of windows `[B, window]`."""

        def record(index: int, states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            block = self.blocks[index]
            result = type(block).forward(block, states, *arguments, **keywords)
            returned = len(result) if isinstance(result, tuple) else 0
            self._calls.append(_Call(_in_float(arguments), _in_float(keywords), returned))
            return result

        self._calls.clear()
        self._run(windows[0], record)
        entered: list[torch.Tensor] = []

        def keep(index: int, states: torch.Tensor) -> torch.Tensor:
            if index == 0:
                entered.append(states.float())
            return states

        for window in windows:
            self._run(window, self._bypass(keep))
        return entered

    @torch.no_grad()
    def run_block(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return what a block makes of float32 hidden states; the block must be in float32."""
        call = self._calls[index]
        result = self.blocks[index](states, *call.arguments, **call.keywords)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    @torch.no_grad()
    def leave(self, window: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return what the output head sees of the states that come out of the last block."""

        def put(index: int, entering: torch.Tensor) -> torch.Tensor:
            return states.to(self._dtype) if index == 0 else entering

        output: torch.Tensor = self._run(window, self._bypass(put)).last_hidden_state
        return output

    def _run(self, window: torch.Tensor, forward: Callable[..., Any]) -> Any:
        with _forward_by(self.blocks, forward):
            return self._base(input_ids=window[None], use_cache=False)

    def _bypass(self, change: Callable[[int, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def forward(index: int, states: torch.Tensor, *_: Any, **__: Any) -> Any:
            result, returned = change(index, states), self._calls[index].returned
            return (result,) * returned if returned else result

        return forward


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


def _in_float(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float(item) for item in value)
    return {key: _in_float(item) for key, item in value.items()} if isinstance(value, dict) else value
