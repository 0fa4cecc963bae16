"""
Which stored tensor belongs to which parameter of a model, by Transformers' own renaming rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantplug.draft import layer_number, number_of_layers
from quantplug.expertnames import ExpertIndex
from quantplug.names import GENERIC
from quantplug_transformers.experts import sizes_of, width

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from transformers import PreTrainedModel

    from quantplug.names import Architecture

_DENSE = "weight"


@dataclass(frozen=True, slots=True)
class StoredNames:
    """
    How the names in a checkpoint and those in a model correspond.

    Attributes:
        targets: stored tensor -> parameter or buffer of the model, for the tensors that are one.
        modules: module path in the model -> stored module paths it is made from, in order of appearance.
        converted: parameters that Transformers splits, merges or reshapes out of what is stored.
        ignored: stored tensors that the model class leaves out on purpose.
        containers: path of a module with routed experts -> stored path that they lie under.
    """

    targets: Mapping[str, str]
    modules: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]
    ignored: tuple[str, ...]
    containers: Mapping[str, str] = field(default_factory=dict)

    def stored(self, path: str) -> str:
        """Return the stored path of a module, or its own path when nothing (or more than one) is stored for it."""
        found = self.modules.get(path, ())
        return found[0] if len(found) == 1 else path


@dataclass(slots=True)
class _Matching:
    targets: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, None]] = field(default_factory=dict)
    converted: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)


def match_names(model: PreTrainedModel, stored: Iterable[str], rules: Architecture = GENERIC) -> StoredNames:
    """
    Match the tensor names of a checkpoint with a model that has its original modules.

    A quantized layer is matched by where its dense `weight` would go, and experts by where what their container holds
    would, however the checkpoint spells them within it.

    Args:
        model: any device; only names are looked at.
        stored: tensor names of the checkpoint.
        rules: how the family spells experts, and where their modules lie in the model.
    """
    stored = list(stored)
    result = _Matching()
    rename = _Renamer(model)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name in sorted(stored, key=_natural):
        path, _, suffix = name.rpartition(".")
        target, produced = rename(name)
        if target is not None:
            result.targets[name] = target
            result.converted.update(produced)
        elif suffix != _DENSE:
            target, produced = rename(f"{path}.{_DENSE}")
            result.converted.update(produced)
        if target is not None:
            result.modules.setdefault(target.rpartition(".")[0], {})[path] = None
        elif any(pattern.search(name) for pattern in ignored):
            result.ignored.append(name)
    return StoredNames(
        result.targets,
        {module: tuple(paths) for module, paths in result.modules.items()},
        frozenset(result.converted),
        tuple(result.ignored),
        _containers(model, rename, ExpertIndex((name.rpartition(".")[0] for name in stored), rules.experts), rules),
    )


def _containers(model: PreTrainedModel, rename: _Renamer, index: ExpertIndex, rules: Architecture) -> dict[str, str]:
    """
    Return path of a module with stacked experts -> the first stored container that would go there.

    Transformers' rules say so of what the module itself holds; before 5.9 they knew single experts only in some
    families, so that those of the core are asked next.
    """
    found = (*index.containers, *index.stacked)
    if not found:
        return {}
    hidden = width(model.config)
    holders = {
        path: next(name for name, _ in module.named_parameters(recurse=False))
        for path, module in model.named_modules()
        if sizes_of(module, hidden) is not None
    }
    places: dict[str, str] = {}
    for container in found:
        paths = [
            (rename(f"{container}.{name}")[0] or "").rpartition(".")[0] for name in dict.fromkeys(holders.values())
        ]
        path = next((path for path in (*paths, rules.renames(container)) if path in holders), None)
        if path is not None:
            places.setdefault(path, container)
    return places


def without_next_n(names: StoredNames, stored: Iterable[str], config: Any, layers: tuple[str, ...]) -> StoredNames:
    """
    Return the correspondence with the layers of a checkpoint left out on purpose that draft tokens for the others.

    No model class runs them; Transformers itself knows them by the layer numbers of released models only.

    Args:
        names: the correspondence.
        stored: tensor names of the checkpoint.
        config: the model's configuration.
        layers: stored paths that numbered layers lie in.
    """
    first = number_of_layers(config.get_text_config().to_dict())
    if first is None:
        return names
    beyond = [name for name in stored if layer_number(name, layers) >= first and name not in names.targets]
    return replace(names, ignored=tuple(dict.fromkeys((*names.ignored, *beyond))))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Order names by their numbers; Transformers' own key cannot compare a number with a word."""
    numbers = [int(part) if part.isdecimal() and len(part) < 10 else -1 for part in name.split(".")]
    return [(number < 0, number, part) for number, part in zip(numbers, name.split("."), strict=True)]


class _Renamer:
    """Transformers' renaming, as its loader applies it."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        self._state: dict[str, torch.Tensor] = model.state_dict()

    def __call__(self, name: str) -> tuple[str | None, list[str]]:
        """Return the parameter a stored tensor goes to (None for none), and all of them where it is converted."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if renamed not in self._state:
            renamed, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        if renamed not in self._state:
            return None, []
        if pattern is None:
            return renamed, []
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        first = converter.target_patterns[0]
        return renamed, [renamed.replace(first, target) for target in converter.target_patterns]
