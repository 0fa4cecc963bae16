"""
What a loaded model is written as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.modules import QuantizedLinear
from quantplug.writeback import stored_tensors
from quantplug_transformers.install import kv_scales_of, plan_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def state_to_save(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Return the model's tensors as a checkpoint holds them, by the model's names: quantized layers bit for bit.

    Transformers turns the model's names into stored ones where they differ.

    Raises:
        LoadError: `QP-LOAD-SOURCE` when the bytes of a layer are gone.
    """
    plan = plan_of(model)
    layers = {module.path: module for module in model.modules() if isinstance(module, QuantizedLinear)}
    own_path = {segment.name: layer.path for layer in plan.layers for segment in layer.segments}
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, tensor in stored_tensors(layers):
        path, _, suffix = name.rpartition(".")
        state[f"{own_path[path]}.{suffix}"] = tensor
    return state | kv_scales_of(model)
