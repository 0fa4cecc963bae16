"""
What a loaded model is written as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from quantplug.modules import QuantizedLinear
from quantplug.moemodules import QuantizedExperts
from quantplug.writeback import stored_tensors
from quantplug_transformers.experts import container_of
from quantplug_transformers.install import kv_scales_of, plan_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from quantplug.plan import LayerPlan


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
    own_path |= {
        container_of(layer): _place(model, layer) for layer in plan.layers if layer.quantized and layer.experts
    }
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, tensor in stored_tensors(layers):
        state[_in_model(name, own_path)] = tensor
    return state | kv_scales_of(model)


def _place(model: PreTrainedModel, layer: LayerPlan) -> str:
    """
    Return the path that Transformers writes as the stored one of a layer of experts.

    It turns names back by its rules for the model's own tensors, which reach single experts in some versions only.
    """
    container, (_, name) = container_of(layer), layer.segments[0].tensors[0]
    rest = name.removeprefix(container)
    for path in (layer.path, container):
        if name in revert_weight_conversion(model, {path + rest: torch.empty(0)}):
            return path
    return layer.path


def _in_model(name: str, own_path: Mapping[str, str]) -> str:
    """Return the name of a stored tensor with the model's path of its layer in place of the stored one."""
    path, rest = name, ""
    while path not in own_path:
        path, _, last = path.rpartition(".")
        rest = f".{last}{rest}"
    return own_path[path] + rest
