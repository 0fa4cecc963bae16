"""
The modules a plan is about: read off a model on the meta device by an adapter, or off the tensor names of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from quantplug.evidence import BIAS_SUFFIX, DENSE_SUFFIX, StoredModules
from quantplug.expertinventory import ExpertContainers
from quantplug.names import GENERIC
from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quantplug.checkpoint import Checkpoint
    from quantplug.config import QuantConfig
    from quantplug.expertrules import ExpertLayer
    from quantplug.jsonio import Json
    from quantplug.names import Architecture
    from quantplug.registry import Registry
    from quantplug.renames import NameMap

ModuleKind = Literal["linear", "experts", "embedding", "other"]

# Path components that are looked at one by one when modules are put in order; the rest of a longer path is one.
_MOST_COMPONENTS = 32
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """
    One module of a model.

    Attributes:
        path: module path in the engine that will run it ("model.layers.0.mlp.gate_up_proj").
        kind: what it is; only "linear" and "experts" are ever given a scheme.
        name: its path in checkpoint names, where matching happens; the same as `path` unless the engine renames.
        class_name: class of the module ("Linear"), for entries that name classes.
        shape: logical size of a linear module when known (from a model), else None (then the format tells).
        bias: whether a linear module has a bias.
        shards: checkpoint paths that are fused into this module, in output order; () when it is stored under `name`.
            For experts the path of every projection of every expert, as `ExpertFiles.projections` orders them, expert
            by expert; for stacked ones just the projections.
        tied_to: path of the module that owns this one's weight, or "".
        head: whether it is an output head (a linear layer onto the vocabulary).
        experts: what kind of experts, for that kind of module.
        router: whether it is a linear layer that chooses experts.
        extras: names of further stored tensors that a linear module owns, besides its weight and bias.
    """

    path: str
    kind: ModuleKind
    name: str = ""
    class_name: str = ""
    shape: LinearShape | None = None
    bias: bool = False
    shards: tuple[str, ...] = ()
    tied_to: str = ""
    head: bool = False
    experts: ExpertLayer | None = None
    router: bool = False
    extras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.path)


@dataclass(frozen=True, slots=True)
class Inventory:
    """
    All modules of one model that own tensors, in model order.

    Attributes:
        modules: the modules.
        unused: stored tensors that the engine leaves out on purpose (a draft head it does not run).
    """

    modules: tuple[ModuleInfo, ...]
    unused: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ModuleInfo]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def inventory_of(
    checkpoint: Checkpoint,
    model_config: Mapping[str, Json],
    registry: Registry,
    config: QuantConfig,
    names: NameMap | None = None,
) -> Inventory:
    """
    Return the modules that the tensor names of a bare checkpoint stand for.

    A module that stores what a scheme of the configuration stores, or a 2-D `weight`, is linear, unless the name rules
    of its family say that it is an embedding. Layers are in the order of their numbers, the rest in file order, the
    head last; a head that is tied and not stored is there, too.

    Args:
        checkpoint: its headers.
        model_config: its config.json.
        registry: for the schemes that `config` names, and for name rules of the model's family.
        config: how it is quantized.
        names: what the modules are called in the engine that will run them (a family's `renames` for Transformers);
            None calls them as the checkpoint does.

    Raises:
        PluginError: `QP-PLUG-MISSING` or `QP-PLUG-CONFLICT` about a scheme that `config` names.
        ConfigError: `QP-CFG-FIELD` when there are experts and config.json does not say how many.
    """
    stored = StoredModules(checkpoint)
    rules = architecture_of(model_config, registry)
    marks = _marks(config, registry)
    containers = ExpertContainers(stored, rules.experts, model_config)
    places = dict.fromkeys(containers.place(path) for path in stored.paths)
    modules = [_experts(path, containers) or _module(path, stored, rules, marks) for path in _model_order(places)]
    modules.sort(key=_is_last)
    if not any(map(_is_last, modules)) and _is_tied(model_config):
        modules += _tied_head(modules, stored, rules)
    if names is not None:
        modules = [replace(module, path=names(module.path)) for module in modules]
    return Inventory(tuple(modules))


def architecture_of(model_config: Mapping[str, Json], registry: Registry) -> Architecture:
    """Return the name rules of a model's family; raises `PluginError` (`QP-PLUG-CONFLICT`)."""
    for config in (model_config, model_config.get("text_config")):
        model_type = config.get("model_type") if isinstance(config, Mapping) else None
        described = registry.architecture_for(model_type) if isinstance(model_type, str) else None
        if described is not None:
            return described.item
    return GENERIC


def _marks(config: QuantConfig, registry: Registry) -> frozenset[str]:
    """Return the suffixes that only a quantized layer has."""
    names = {ref.name for ref in (config.default, *(rule.use for rule in config.rules)) if ref is not None}
    suffixes = {suffix for name in sorted(names) for suffix in registry.scheme(name).item.suffixes}
    return frozenset(suffixes - {DENSE_SUFFIX, BIAS_SUFFIX})


def _experts(path: str, containers: ExpertContainers) -> ModuleInfo | None:
    layer = containers.layer(path)
    if layer is None:
        return None
    return ModuleInfo(
        path,
        "experts",
        class_name="Linear",  # so writers know them
        bias=containers.has_bias(path, layer),
        shards=containers.shards(path, layer),
        experts=layer,
    )


def _module(path: str, stored: StoredModules, rules: Architecture, marks: frozenset[str]) -> ModuleInfo:
    tensors = stored.tensors(path)
    if _ends_with(path, rules.embeddings):
        return ModuleInfo(path, "embedding", class_name="Embedding")
    weight = tensors.get(DENSE_SUFFIX)
    quantized = not marks.isdisjoint(tensors)
    if not quantized and (weight is None or len(weight.shape) != 2):
        return ModuleInfo(path, "other")
    return ModuleInfo(
        path,
        "linear",
        class_name="Linear",
        shape=None if quantized or weight is None else LinearShape(*weight.shape),
        bias=BIAS_SUFFIX in tensors,
        head=_ends_with(path, rules.layer_heads if _in_layer(path) else rules.heads),
        router=_ends_with(path, rules.routers),
        extras=tuple(name for name in rules.extras if name in tensors),
    )


def _is_last(module: ModuleInfo) -> bool:
    """Whether a module is the model's own head, not that of a layer which drafts."""
    return module.head and not _in_layer(module.path)


def _in_layer(path: str) -> bool:
    """Whether a path leads into a numbered layer."""
    return any(part.isdecimal() for part in path.split("."))


def _ends_with(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether the last components of a path are one of these dotted suffixes."""
    return path.endswith(suffixes) and any(f".{path}".endswith(f".{suffix}") for suffix in suffixes)


def _is_tied(model_config: Mapping[str, Json]) -> bool:
    """Whether the head shares the embedding's weight; language models that say nothing and store no head do."""
    for config in (model_config, model_config.get("text_config")):
        if isinstance(config, Mapping) and isinstance(tied := config.get("tie_word_embeddings"), bool):
            return tied
    classes = model_config.get("architectures")
    return isinstance(classes, list) and any(str(name).endswith(_LANGUAGE_MODELS) for name in classes)


def _tied_head(modules: Sequence[ModuleInfo], stored: StoredModules, rules: Architecture) -> list[ModuleInfo]:
    for suffix in rules.embeddings:
        for module in modules:
            if module.kind != "embedding" or not _ends_with(module.path, (suffix,)):
                continue
            weight = stored.tensors(module.path).get(DENSE_SUFFIX)
            shape = LinearShape(*weight.shape) if weight is not None and len(weight.shape) == 2 else None
            head = ModuleInfo(
                rules.heads[0], "linear", class_name="Linear", shape=shape, tied_to=module.path, head=True
            )
            return [head]
    return []


def _model_order(paths: Iterable[str]) -> list[str]:
    """
    Sort by layer number, and otherwise by which sibling the files name first.

    Siblings of different layers count as one: the order within layer 10 is that within the first layer named.
    """
    ranks: dict[tuple[int, str], int] = {}

    def key(path: str) -> list[tuple[int, int]]:
        place, node = [], 0
        for part in path.split(".", _MOST_COMPONENTS):
            number = int(part) if part.isdecimal() and len(part) < 10 else None
            node = ranks.setdefault((node, part if number is None else "#"), len(ranks) + 1)
            place.append((node, number or 0))
        return place

    return [path for _, path in sorted((key(path), path) for path in paths)]
