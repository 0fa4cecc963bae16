"""
Putting planned layers into a model: placeholders before its dense tensors are loaded, weights afterwards.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch

from quantplug.load import LoadedLayers, load_layers
from quantplug.modules import QuantizedLinear
from quantplug.schemes import SchemeCache
from quantplug_transformers.experts import RoutedExperts, container_of
from quantplug_transformers.overrides import override_methods

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from quantplug.plan import LayerPlan, Plan
    from quantplug.preparedmodule import PreparedModule
    from quantplug_transformers.request import Request


class Installation:
    """One model on its way from a skeleton on the meta device to one that runs."""

    def __init__(self, model: PreTrainedModel, request: Request) -> None:
        self._model = model
        self._request = request
        self._placeholders: dict[str, PreparedModule] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._ignored = model._keys_to_ignore_on_load_unexpected

    def place(self) -> None:
        """Replace the planned layers by ones without parameters, untie them, and say which tensors are theirs."""
        model, request = self._model, self._request
        schemes = SchemeCache(request.registry)
        for layer in request.plan.layers:
            if layer.quantized:
                module_class = QuantizedLinear if layer.experts is None else RoutedExperts
                module = module_class(layer, request.plan, request.registry, schemes)
                self._placeholders[layer.path] = module
                model.set_submodule(layer.path, module)
        for target in list(model.all_tied_weights_keys):
            if target.rpartition(".")[0] in self._placeholders:
                del model.all_tied_weights_keys[target]
                untie(model.config)
        # Transformers before 5.4 keeps a list here, later a set.
        kind = set if isinstance(self._ignored, set) else list
        model._keys_to_ignore_on_load_unexpected = kind([*(self._ignored or ()), *_patterns(request.plan)])
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def fill(self, device_of: Callable[[str], torch.device]) -> None:
        """
        Load the quantized layers and finish the model.

        Args:
            device_of: who says where a layer runs.

        Raises:
            QuantplugError: as `load_layers` does; the model is of no use then.
        """
        model, request = self._model, self._request
        model._keys_to_ignore_on_load_unexpected = self._ignored
        loaded = load_layers(
            request.plan,
            request.directory,
            devices={path: device_of(path) for path in self._placeholders},
            modules=self._placeholders,
            progress=request.progress,
            registry=request.registry,
        )
        for name, parameter in model.named_parameters():
            # Some versions keep the stored dtype of tensors in a checkpoint that is quantized.
            parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))
            parameter.requires_grad_(False)
        override_methods(model)
        attach(model, request.plan, request.directory, loaded)


def attach(model: PreTrainedModel, plan: Plan, source: Path, loaded: LoadedLayers) -> None:
    """
    Leave the plan, the account of the load, the checkpoint's place, and what was handed over on the model.

    They are `quantplug_plan`, `quantplug_report`, `quantplug_source`, and `quantplug_kv_scales`: Transformers keeps the
    cache of keys and values in the model's dtype, so that nothing here uses those scales.
    """
    setattr(model, "quantplug_plan", plan)  # noqa: B010  # a PreTrainedModel declares no such attribute
    setattr(model, "quantplug_report", loaded.report)  # noqa: B010
    setattr(model, "quantplug_source", source)  # noqa: B010
    setattr(model, "quantplug_kv_scales", loaded.kv_scales)  # noqa: B010


def plan_of(model: PreTrainedModel) -> Plan:
    """Return the plan a model was loaded by."""
    return cast("Plan", model.quantplug_plan)


def source_of(model: PreTrainedModel) -> Path:
    """Return the directory a model was loaded from."""
    return cast("Path", model.quantplug_source)


def kv_scales_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the stored scales of a cache of keys and values, by stored name."""
    return dict(cast("Mapping[str, torch.Tensor]", model.quantplug_kv_scales))


def untie(config: Any) -> None:
    """Note in a model's configuration that its head has weights of its own."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False


def _patterns(plan: Plan) -> list[str]:
    """Return expressions for the tensors that Transformers is to pass over: the account of them is the core's."""
    names = [name for left in plan.left for name in left.names]
    names += plan.kv_cache.scales if plan.kv_cache else ()
    suffixes = {suffix for layer in plan.layers for segment in layer.segments for suffix, _ in segment.tensors}
    suffixes |= {name.rpartition(".")[2] for layer in plan.layers if layer.quantized for name in layer.tensors}
    endings = [rf"\.(?:{'|'.join(map(re.escape, sorted(suffixes)))})$"] if suffixes else []
    # Of experts, Transformers may have joined the names already: whatever goes to such a module is meant. Layers differ
    # in their numbers only, so that one expression serves them all.
    places = {place for layer in plan.layers if layer.quantized and layer.experts for place in _places(layer)}
    within = {re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(place)) for place in places}
    return endings + [rf"^{place}\." for place in sorted(within)] + [rf"^{re.escape(name)}$" for name in names]


def _places(layer: LayerPlan) -> tuple[str, str]:
    """Return the path of a layer of experts in the model, and in the checkpoint."""
    return layer.path, container_of(layer)
