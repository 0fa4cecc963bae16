"""
Moving or casting a model that holds prepared layers: refused before anything of it has changed.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch

from quantplug.modules import QuantizedLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def guard_moves(model: PreTrainedModel) -> None:
    """
    Make `to`, `half`, `float` and the like ask every prepared layer first.

    torch applies a move child by child, so a layer that refuses would leave the ones before it moved. `half` and
    `float` are torch's own again: those of `PreTrainedModel` refuse every quantized model without a reason.
    """
    for name, function in (("_apply", _apply), ("half", _half), ("float", _float)):
        object.__setattr__(model, name, MethodType(function, model))


def _apply(model: PreTrainedModel, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._apply(fn)
    return type(model)._apply(model, fn, recurse)


def _half(model: PreTrainedModel) -> PreTrainedModel:
    return torch.nn.Module.half(model)


def _float(model: PreTrainedModel) -> PreTrainedModel:
    return torch.nn.Module.float(model)
