"""
What a calibration text sends through each linear layer, one decoder block at a time.

Beside the model, only the text's hidden states and one block's statistics are held. The blocks compute in the model's
own dtype, as they will; the sums are float32. Later blocks see what the quantized earlier ones compute, so that
rounding them can make up for it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from quantplug.checkpoint import open_checkpoint
from quantplug.errors import ConvertError
from quantplug.host import CalibrationBlock
from quantplug_transformers.decoder import Decoder
from quantplug_transformers.inventory import is_linear
from quantplug_transformers.loading import from_pretrained
from quantplug_transformers.names import match_names
from quantplug_transformers.running import hidden_bars
from quantplug_transformers.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from quantplug_transformers.names import StoredNames


class LinearLayers(CalibrationBlock):
    """The linear layers of one block, or the output head, and their statistics."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], hessians: Mapping[str, torch.Tensor]) -> None:
        self._modules = modules
        self._hessians = hessians

    @property
    def hessians(self) -> Mapping[str, torch.Tensor]:
        """Checkpoint path -> float32 `[K, K]`; layers that see the same input share one tensor."""
        return self._hessians

    def replace(self, path: str, values: torch.Tensor) -> None:
        """Give a layer other weights; what was tied to the old ones keeps those."""
        old = self._modules[path].get_parameter("weight")
        self._modules[path].weight = torch.nn.Parameter(values.to(old), requires_grad=False)


def calibrate(source: Path, text: str, *, tokens: int, window: int) -> Iterator[CalibrationBlock]:
    """
    Load a dense checkpoint and return its blocks in model order, the output head last.

    Args:
        source: its directory.
        text: at least `window` tokens long.
        tokens: how many tokens of it to use at most.
        window: sequence length in tokens.

    Raises:
        ConvertError: `QP-CONV-CALIBRATION` when the text is too short, or the model has no row of equal blocks.
        HostError: when the model or its tokenizer cannot be loaded.
    """
    ids = read_tokenizer(source)(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids), tokens) // window if window > 0 else 0
    if count < 1:
        raise ConvertError(
            "QP-CONV-CALIBRATION",
            "calibration text",
            f"has {len(ids)} tokens, and {tokens} may be used",
            expected=f"at least one window of {window}",
            fix="Give a longer text.",
        )
    with hidden_bars():
        model = from_pretrained(source)
    names = match_names(model, open_checkpoint(source).tensors)
    return _walk(model, Decoder(model), names, torch.tensor(ids[: count * window]).view(count, window))


def _walk(
    model: PreTrainedModel, decoder: Decoder, names: StoredNames, windows: torch.Tensor
) -> Iterator[CalibrationBlock]:
    batches = decoder.batches(windows)
    states = [decoder.enter(batch) for batch in batches]
    for index, block in enumerate(decoder.blocks):
        paths = {module: path for path, module in block.named_modules() if is_linear(module)}
        linear = {names.stored(f"{decoder.prefix}.{index}.{path}"): module for module, path in paths.items()}
        with _observed(linear) as hessians:
            for state in states:
                decoder.run_block(index, state)
        yield LinearLayers(linear, hessians)
        states = [decoder.run_block(index, state) for state in states]
    head = model.get_output_embeddings()
    if head is not None and is_linear(head):
        path = names.stored(next(path for path, module in model.named_modules() if module is head))
        hessian = torch.zeros(head.in_features, head.in_features)
        for batch, state in zip(batches, states, strict=True):
            _add(hessian, decoder.leave(batch, state))
        yield LinearLayers({path: head}, {path: hessian})


@contextmanager
def _observed(linear: Mapping[str, torch.nn.Module]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Sum up what enters linear layers, once for those that are given the very same tensor one after the other."""
    hessians: dict[str, torch.Tensor] = {}
    paths = {module: path for path, module in linear.items()}
    owners: dict[str, str] = {}
    last: tuple[torch.Tensor | None, str] = (None, "")

    def observe(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal last
        path, states = paths[module], arguments[0]
        owner = last[1] if states is last[0] else path
        last = (states, owner)
        if owners.setdefault(path, owner) != owner:
            raise ConvertError(
                "QP-CONV-CALIBRATION",
                path,
                f"shares its input with {owners[path]} for some windows only",
                expected="a model that does the same for every text",
                fix="Convert it without a calibration text.",
            )
        if path not in hessians:
            size = states.shape[-1]
            hessians[path] = hessians[owner] if owner != path else torch.zeros(size, size)
        if owner == path:
            _add(hessians[path], states)

    handles = [module.register_forward_pre_hook(observe) for module in paths]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _add(hessian: torch.Tensor, states: torch.Tensor) -> None:
    rows = states.flatten(0, -2).to(torch.float32)
    hessian.addmm_(rows.t(), rows)
