"""
From what single plugins offer to one registry: names merged, claims that collide left out and kept as conflicts.

The result depends on what was offered, never on the order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from quantplug.dense import DenseProduct, offers_dense
from quantplug.detect import CpuProvider, CudaProvider
from quantplug.errors import PluginError
from quantplug.kernel import LinearKernel
from quantplug.moeloop import LoopKernel
from quantplug.offers import Offer
from quantplug.reference import ReferenceKernel
from quantplug.registry import Conflict, Disabled, PluginFailure, PluginInfo, Provided, Recipe, Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.moekernel import Kernel, MoEKernel
    from quantplug.names import Architecture

T = TypeVar("T")

CORE = "quantplug-core"
"""The distribution that provides what is always there."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin that passed every stage, and what it offers."""

    info: PluginInfo
    offer: Offer


_CORE = Loaded(
    PluginInfo(CORE, "", "", "", "", (), ""),
    Offer(
        kernels={kernel.name: kernel for kernel in (ReferenceKernel(),)},
        platforms={provider.kind: provider for provider in (CpuProvider(), CudaProvider())},
    ),
)


def assemble(
    loaded: Sequence[Loaded], failures: Sequence[PluginFailure], disabled: Sequence[Disabled] = ()
) -> Registry:
    """Merge the offers of all plugins, and the core's own, into a registry."""
    refused = {plugin.info: word for plugin in loaded if (word := _core_name(plugin.offer))}
    plugins = sorted((p for p in loaded if p.info not in refused), key=lambda p: (p.info.distribution, p.info.entry))
    failures = [*failures, *(_takes_core_name(info, word) for info, word in refused.items())]

    conflicts: list[Conflict] = []
    everyone = [_CORE, *plugins]
    schemes = _merge("scheme", [(p.info, p.offer.schemes) for p in everyone], conflicts)
    recipes = _merge("recipe", [(p.info, _recipes(p.offer)) for p in everyone], conflicts)
    both_kinds = _merge("kernel", [(p.info, p.offer.kernels) for p in everyone], conflicts)
    platforms_by_kind = _merge("platform", [(p.info, p.offer.platforms) for p in everyone], conflicts)
    hosts = _merge("host", [(p.info, p.offer.hosts) for p in everyone], conflicts)
    peers = _merge("peer", [(p.info, p.offer.peers) for p in everyone], conflicts)
    dialects = _merge("dialect", [(p.info, p.offer.dialects) for p in everyone], conflicts)
    _merge("quant_method", [(p.info, _methods(p.offer)) for p in everyone], conflicts)
    conflicts += _methods_of_conflicts(plugins, conflicts)
    return Registry(
        plugins=tuple(p.info for p in plugins),
        failures=tuple(sorted(failures, key=lambda f: (f.distribution, f.entry, f.stage, f.location, f.error))),
        schemes=schemes,
        dialects=dialects,
        kernels=_linear(both_kinds),
        moe_kernels=_for_experts(both_kinds),
        platforms=platforms_by_kind,
        hosts=hosts,
        peers=peers,
        architectures=_architectures(plugins, conflicts),
        recipes=MappingProxyType({name: r for name, r in recipes.items() if r.item.scheme in schemes}),
        conflicts=tuple(sorted(conflicts, key=lambda c: (c.kind, c.name))),
        disabled=tuple(disabled),
    )


def _linear(kernels: Mapping[str, Provided[Kernel]]) -> Mapping[str, Provided[LinearKernel]]:
    """Return the kernels for linear layers: those there are, and a dense product for each that dequantizes."""
    found: dict[str, Provided[LinearKernel]] = {}
    for provided in kernels.values():
        if isinstance(provided.item, LinearKernel):
            found[provided.item.name] = Provided(provided.item, provided.plugin)
            if offers_dense(provided.item):
                dense = DenseProduct(provided.item)
                found.setdefault(dense.name, Provided(dense, provided.plugin))
    return MappingProxyType(dict(sorted(found.items())))


def _for_experts(kernels: Mapping[str, Provided[Kernel]]) -> Mapping[str, Provided[MoEKernel]]:
    """Return the kernels for experts: those of their own, and every kernel for linear layers in a loop."""
    found: dict[str, Provided[MoEKernel]] = {}
    for provided in kernels.values():
        kernel = LoopKernel(provided.item) if isinstance(provided.item, LinearKernel) else provided.item
        found[kernel.name] = Provided(kernel, provided.plugin)
    return MappingProxyType(found)


def _core_name(offer: Offer) -> str:
    """Return what of the core's an offer claims for itself, in words, or ""."""
    kernels = [f"kernel {name!r}" for name in sorted(_CORE.offer.kernels.keys() & offer.kernels.keys())]
    platforms = [f"platform {name!r}" for name in sorted(_CORE.offer.platforms.keys() & offer.platforms.keys())]
    return " and ".join(kernels + platforms)


def _takes_core_name(info: PluginInfo, word: str) -> PluginFailure:
    error = PluginError(
        "QP-PLUG-CALL", info.module, f"provides {word}, which is the core's own", expected="another name"
    )
    return PluginFailure(info.distribution, info.version, info.entry, "call", str(error), location=info.location)


def _merge(
    kind: str, offers: Sequence[tuple[PluginInfo, Mapping[str, T]]], conflicts: list[Conflict]
) -> Mapping[str, Provided[T]]:
    """Return what exactly one plugin claims, sorted by name; append a conflict for every other name."""
    claims: dict[str, list[tuple[PluginInfo, T]]] = {}
    for info, items in offers:
        for name, item in items.items():
            claims.setdefault(name, []).append((info, item))
    conflicts += [
        Conflict(kind, name, _claimants([info for info, _ in found]))
        for name, found in claims.items()
        if len(found) > 1
    ]
    return MappingProxyType(
        {
            name: Provided(item, info.distribution)
            for name, [(info, item), *others] in sorted(claims.items(), key=lambda claim: claim[0])
            if not others
        }
    )


def _claimants(infos: Sequence[PluginInfo]) -> tuple[str, ...]:
    names = sorted({info.distribution for info in infos})
    return tuple(names if len(names) > 1 else sorted(f"{info.distribution} ({info.entry})" for info in infos))


def _recipes(offer: Offer) -> dict[str, Recipe]:
    return {
        name: Recipe(scheme, params) for scheme, recipes in offer.recipes.items() for name, params in recipes.items()
    }


def _methods(offer: Offer) -> dict[str, str]:
    return {method: name for name, dialect in offer.dialects.items() for method in dialect.methods}


def _methods_of_conflicts(plugins: Sequence[Loaded], conflicts: Sequence[Conflict]) -> list[Conflict]:
    """Return a conflict for each method that only a dialect of a contested name reads: it has no reader left."""
    contested = {conflict.name: conflict for conflict in conflicts if conflict.kind == "dialect"}
    known = {conflict.name for conflict in conflicts if conflict.kind == "quant_method"}
    lost = {
        method: contested[name]
        for plugin in plugins
        for method, name in _methods(plugin.offer).items()
        if name in contested and method not in known
    }
    return [replace(conflict, kind="quant_method", name=method) for method, conflict in lost.items()]


def _architectures(plugins: Sequence[Loaded], conflicts: list[Conflict]) -> tuple[Provided[Architecture], ...]:
    by_type = [
        (p.info, {model_type: a for a in p.offer.architectures.values() for model_type in a.model_types})
        for p in plugins
    ]
    alone = _merge("model_type", by_type, conflicts)
    return tuple(
        Provided(architecture, plugin.info.distribution)
        for plugin in plugins
        for architecture in plugin.offer.architectures.values()
        if all(model_type in alone for model_type in architecture.model_types)
    )
