"""
What the installed plugins offer, by name: a value that is passed around; `plugins.py` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.config import Dialect
    from quantplug.detect import PlatformProvider
    from quantplug.host import Host
    from quantplug.kernel import LinearKernel
    from quantplug.names import Architecture
    from quantplug.scheme import LinearScheme

T = TypeVar("T")

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
        detail: traceback, for `--verbose` and bug reports.
        location: the directory the distribution's metadata lies in.
    """

    distribution: str
    version: str
    entry: str
    stage: Stage
    error: str
    detail: str = ""
    location: str = ""

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        entry = f" ({self.entry})" if self.entry else ""
        return f"{self.distribution}{version}{entry} failed at {self.stage}: {self.error}"


@dataclass(frozen=True, slots=True)
class Provided(Generic[T]):
    """Something a plugin provides, and the distribution it came from."""

    item: T
    plugin: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two distributions that claim one name; using that name is an error until the policy picks one."""

    kind: str
    name: str
    plugins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Registry:
    """
    Everything the installed plugins offer. Frozen once built; conflicting names are absent from the mappings.

    Attributes:
        plugins: those that registered, by distribution name.
        failures: those that did not, and those whose hooks misbehaved.
        conflicts: names claimed more than once.
        schemes: by scheme name.
        dialects: by dialect name.
        kernels: by kernel name; the core's `reference` is always there.
        platforms: by platform kind.
        hosts: by host name.
        architectures: in order of distribution name.
    """

    plugins: tuple[PluginInfo, ...]
    failures: tuple[PluginFailure, ...]
    conflicts: tuple[Conflict, ...]
    schemes: Mapping[str, Provided[type[LinearScheme]]]
    dialects: Mapping[str, Provided[Dialect]]
    kernels: Mapping[str, Provided[LinearKernel]]
    platforms: Mapping[str, Provided[PlatformProvider]]
    hosts: Mapping[str, Provided[Host]]
    architectures: tuple[Provided[Architecture], ...]
