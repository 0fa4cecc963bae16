"""
What a loaded model is written as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.modules import QuantizedLinear
from quantplug.moemodules import QuantizedExperts
from quantplug.writeback import stored_tensors
from quantplug_transformers.experts import container_of
from quantplug_transformers.install import kv_scales_of, plan_of

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    layers = {m.path: m for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedExperts))}
    own_path = {
        segment.name: layer.path for layer in plan.layers if layer.experts is None for segment in layer.segments
    }
    own_path |= {container_of(layer): layer.path for layer in plan.layers if layer.quantized and layer.experts}
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, tensor in stored_tensors(layers):
        state[_in_model(name, own_path)] = tensor
    return state | kv_scales_of(model)


def _in_model(name: str, own_path: Mapping[str, str]) -> str:
    """Return the name of a stored tensor with the model's path of its layer in place of the stored one."""
    path, rest = name, ""
    while path not in own_path:
        path, _, last = path.rpartition(".")
        rest = f".{last}{rest}"
    return own_path[path] + rest
