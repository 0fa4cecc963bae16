"""
What the installed plugins offer, by name: a value that is passed around; `plugins.py` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from quantplug.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.config import Dialect
    from quantplug.detect import PlatformProvider
    from quantplug.host import Host
    from quantplug.jsonio import Json
    from quantplug.kernel import LinearKernel
    from quantplug.moekernel import MoEKernel
    from quantplug.names import Architecture
    from quantplug.peers import PeerReader
    from quantplug.scheme import LinearScheme

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Stage = Literal["metadata", "api", "import", "hooks", "call"]


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """
    One plugin that registered.

    Attributes:
        distribution: name of the installed distribution, normalised ("quantplug-gptq").
        version: its version.
        entry: entry-point name ("gptq").
        module: the module it names ("quantplug_gptq.plugin").
        api: its `quantplug_api` range.
        hooks: the hooks it implements, sorted.
        location: the directory the distribution's metadata lies in.
    """

    distribution: str
    version: str
    entry: str
    module: str
    api: str
    hooks: tuple[str, ...]
    location: str


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """
    One plugin, or distribution, that did not register or misbehaved when asked.

    Attributes:
        distribution: its name, or the metadata directory's when it has none.
        version: its version, "" when unknown.
        entry: entry-point name, "" when the distribution as a whole failed.
        stage: where it failed.
        error: exception type and message, one line.
        detail: traceback, for `--verbose` and bug reports; no part of equality.
        location: the directory the distribution's metadata lies in.
    """

    distribution: str
    version: str
    entry: str
    stage: Stage
    error: str
    detail: str = field(default="", compare=False)
    location: str = ""

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        entry = f" ({self.entry})" if self.entry else ""
        return f"{self.distribution}{version}{entry} failed at {self.stage}: {self.error}"


@dataclass(frozen=True, slots=True)
class Disabled:
    """One plugin that is installed and was kept out on purpose; none of its code ran."""

    distribution: str
    entry: str
    by: str
    """The environment variable that keeps it out."""

    def __str__(self) -> str:
        return f"{self.distribution} ({self.entry}) is kept out by {self.by}"


@dataclass(frozen=True, slots=True)
class Provided(Generic[T_co]):
    """Something a plugin provides, and the distribution it came from."""

    item: T_co
    plugin: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A grid that dense weights can be quantized to: the scheme and its parameters."""

    scheme: str
    params: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Conflict:
    """
    Two plugins that claim one name; using that name is an error until the user keeps one of them out.

    Attributes:
        kind: what the name names ("scheme", "recipe", "dialect", "quant_method", "kernel", "platform", "host",
            "peer", "model_type", "entry point").
        name: the name.
        plugins: the distributions that claim it, sorted; with the entry point where one distribution does so twice.

    """

    kind: str
    name: str
    plugins: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} is claimed by {' and '.join(self.plugins)}"

    def error(self) -> PluginError:
        """Return what using the name raises."""
        distribution, _, entry = self.plugins[-1].rstrip(")").partition(" (")
        return PluginError(
            "QP-PLUG-CONFLICT",
            f"{self.kind} {self.name!r}",
            f"claimed by {' and '.join(self.plugins)}",
            expected="one plugin per name",
            fix=f"Uninstall one of them, or keep one out: QUANTPLUG_DISABLE_PLUGINS={entry or distribution}",
        )


@dataclass(frozen=True, slots=True)
class Registry:
    """
    Everything the installed plugins offer. Frozen once built; conflicting names are absent from the mappings.

    Attributes:
        plugins: those that registered, by distribution name.
        failures: those that did not, and those whose hooks misbehaved; nothing of them is in the mappings.
        conflicts: names claimed more than once.
        schemes: by scheme name.
        dialects: by dialect name.
        kernels: those for linear layers by name; the core's `reference` is always there, and for each of a plugin that
            dequantizes a `<name>.dense`.
        moe_kernels: those for experts by name; for every one that a plugin has for linear layers, and for `reference`,
            there is a `loop.<name>`.
        platforms: by platform kind; the core's `cpu` and `cuda` are always there.
        hosts: by host name.
        peers: rules of other engines, by the engine's name.
        architectures: in order of distribution name; no two of them answer to one model type.
        recipes: names of grids that dense weights can be quantized to, with the scheme and parameters of each.
        disabled: installed plugins that the environment keeps out.

    """

    plugins: tuple[PluginInfo, ...]
    failures: tuple[PluginFailure, ...]
    conflicts: tuple[Conflict, ...]
    schemes: Mapping[str, Provided[type[LinearScheme]]]
    dialects: Mapping[str, Provided[Dialect]]
    kernels: Mapping[str, Provided[LinearKernel]]
    moe_kernels: Mapping[str, Provided[MoEKernel]]
    platforms: Mapping[str, Provided[PlatformProvider]]
    hosts: Mapping[str, Provided[Host]]
    peers: Mapping[str, Provided[PeerReader]]
    architectures: tuple[Provided[Architecture], ...]
    recipes: Mapping[str, Provided[Recipe]]
    disabled: tuple[Disabled, ...] = ()

    def scheme(self, name: str) -> Provided[type[LinearScheme]]:
        """Return the scheme of that name; raises `PluginError` (`QP-PLUG-MISSING`, `QP-PLUG-CONFLICT`)."""
        return self._lookup("scheme", name, self.schemes)

    def recipe(self, name: str) -> Provided[Recipe]:
        """Return the recipe of that name; raises `PluginError` (`QP-PLUG-MISSING`, `QP-PLUG-CONFLICT`)."""
        return self._lookup("recipe", name, self.recipes)

    def kernel(self, name: str) -> Provided[LinearKernel]:
        """Return the kernel of that name; raises `PluginError` (`QP-PLUG-MISSING`, `QP-PLUG-CONFLICT`)."""
        return self._lookup("kernel", name, self.kernels)

    def moe_kernel(self, name: str) -> Provided[MoEKernel]:
        """Return the kernel for experts of that name; raises `PluginError` (`QP-PLUG-MISSING`, `QP-PLUG-CONFLICT`)."""
        return self._lookup("kernel", name, self.moe_kernels)

    def host(self, name: str | None = None) -> Provided[Host]:
        """
        Return the host of that name, or the only one there is.

        Raises:
            PluginError: `QP-PLUG-MISSING` when there is none of that name or none at all, `QP-PLUG-CONFLICT` when two
                plugins claim the name, or there are several and none is named.

        """
        if name is not None:
            return self._lookup("host", name, self.hosts)
        if self.hosts:
            return self._only("host", self.hosts)
        claimed = next((conflict for conflict in self.conflicts if conflict.kind == "host"), None)
        raise claimed.error() if claimed else self._missing("host", "", self.hosts)

    def dialect_for(self, method: str) -> Provided[Dialect]:
        """Return who reads that `quant_method`; raises `PluginError` (`QP-PLUG-MISSING`, `QP-PLUG-CONFLICT`)."""
        methods = {m: provided for provided in self.dialects.values() for m in provided.item.methods}
        return self._lookup("quant_method", method, methods)

    def dialect_writing(self, scheme: str) -> Provided[Dialect]:
        """
        Return the dialect that describes checkpoints of a scheme.

        Raises:
            PluginError: `QP-PLUG-MISSING` when there is no such scheme or nobody describes it, `QP-PLUG-CONFLICT` when
                several do.

        """
        self.scheme(scheme)
        writers = {name: provided for name, provided in self.dialects.items() if scheme in provided.item.writes}
        if writers:
            return self._only(f"dialect that writes {scheme!r}", writers)
        raise self._missing("dialect that writes", scheme, writers)

    def architecture_for(self, model_type: str) -> Provided[Architecture] | None:
        """Return the name rules of that `model_type`, None when nobody described it; raises `QP-PLUG-CONFLICT`."""
        self._refuse_conflict("model_type", model_type)
        return next((a for a in self.architectures if model_type in a.item.model_types), None)

    def _only(self, kind: str, mapping: Mapping[str, Provided[T]]) -> Provided[T]:
        only, *others = mapping.values()
        if others:
            raise PluginError(
                "QP-PLUG-CONFLICT",
                kind,
                f"several are installed: {_listing(mapping)}",
                expected="one, or the name of one",
                fix="Say which one is meant, or keep the others out with QUANTPLUG_DISABLE_PLUGINS",
            )
        return only

    def _lookup(self, kind: str, name: str, mapping: Mapping[str, Provided[T]]) -> Provided[T]:
        self._refuse_conflict(kind, name)
        if name not in mapping:
            raise self._missing(kind, name, mapping)
        return mapping[name]

    def _refuse_conflict(self, kind: str, name: str) -> None:
        for conflict in self.conflicts:
            if (conflict.kind, conflict.name) == (kind, name):
                raise conflict.error()

    def _missing(self, kind: str, name: str, mapping: Mapping[str, Provided[T]]) -> PluginError:
        from difflib import get_close_matches

        advice = "".join(f"Did you mean {match!r}? " for match in get_close_matches(name, mapping, n=1))
        advice += f"Install a plugin that brings {'it' if name else f'a {kind}'}"
        advice += "".join(f"; note that {remark}" for remark in self._remarks())
        return PluginError(
            "QP-PLUG-MISSING",
            f"{kind} {name!r}" if name else kind,
            "no installed plugin provides it" if name else "no installed plugin provides any",
            expected=f"one of: {_listing(mapping)}" if mapping else "",
            fix=advice,
        )

    def _remarks(self) -> Iterable[object]:
        yield from self.failures
        yield from self.disabled
        yield from self.conflicts


def _listing(mapping: Mapping[str, Provided[T]]) -> str:
    return ", ".join(f"{name} ({provided.plugin})" for name, provided in sorted(mapping.items()))
