"""
What a loaded model is written as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from quantplug.checkpoint import open_checkpoint
from quantplug.errors import CheckpointError, LoadError
from quantplug.evidence import NOT_RUN
from quantplug.modules import QuantizedLinear
from quantplug.moemodules import QuantizedExperts
from quantplug.reader import TensorReader
from quantplug.writeback import stored_tensors
from quantplug_transformers.experts import container_of
from quantplug_transformers.install import kv_scales_of, plan_of, source_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from quantplug.plan import LayerPlan, Plan


def state_to_save(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Return the model's tensors as a checkpoint holds them, by the model's names: quantized layers bit for bit.

    Transformers turns the model's names into stored ones where they differ. What the checkpoint holds and the model
    class does not run, such as a layer that drafts, is written again as it lies there.

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
    return state | kv_scales_of(model) | _not_run(plan, source_of(model))


def _not_run(plan: Plan, source: Path) -> dict[str, torch.Tensor]:
    names = [name for left in plan.left if left.reason == NOT_RUN for name in left.names]
    if not names:
        return {}
    try:
        with TensorReader(open_checkpoint(source)) as reader:
            return {name: reader.read(name) for name in names}
    except CheckpointError as gone:
        raise LoadError(
            "QP-LOAD-SOURCE", str(source), f"{gone.where}: {gone.what}; {len(names)} of its tensors are in no module",
            expected="the checkpoint as it was loaded", fix="Keep the directory where it was until the model is saved.",
        ) from gone  # fmt: skip


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
