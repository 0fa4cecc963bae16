"""
What a model does in its own way once it holds prepared layers: moving, casting, counting.

The methods are set on the instance: its class stays the one that config.json names and that is written on saving.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from quantplug.preparedmodule import PreparedModule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


def override_methods(model: PreTrainedModel) -> None:
    """
    Make a model aware of its prepared layers.

    `to` and the like ask every prepared layer first: torch applies a move child by child, so a layer that refuses would
    leave the ones before it moved. `half` and `float` are torch's own again, as those of `PreTrainedModel` refuse every
    quantized model without a reason. `num_parameters` counts the weights of prepared layers, too.
    """
    for name, function in (
        ("_apply", _apply),
        ("half", _half),
        ("float", _float),
        ("num_parameters", _num_parameters),
    ):
        # A partial, unlike a bound method, is copied and pickled together with the model it is about.
        object.__setattr__(model, name, partial(function, model))


def _prepared(model: PreTrainedModel) -> Iterator[PreparedModule]:
    return (module for module in model.modules() if isinstance(module, PreparedModule))


def _apply(model: PreTrainedModel, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PreTrainedModel:
    for module in _prepared(model):
        module._apply(fn)
    moved: PreTrainedModel = type(model)._apply(model, fn, recurse)
    return moved


def _half(model: PreTrainedModel) -> PreTrainedModel:
    return torch.nn.Module.half(model)


def _float(model: PreTrainedModel) -> PreTrainedModel:
    return torch.nn.Module.float(model)


def _num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    dense = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    return dense if only_trainable else dense + sum(module.parameter_count for module in _prepared(model))
