"""
Which of the installed plugins the environment lets in: `QUANTPLUG_PLUGINS` and `QUANTPLUG_DISABLE_PLUGINS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.distributions import normalise
from quantplug.errors import PluginError
from quantplug.registry import Disabled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.distributions import Distribution
    from quantplug.registry import PluginFailure

ALLOW = "QUANTPLUG_PLUGINS"
"""Comma-separated distribution or entry-point names; only these are imported, and an empty list means none."""

DENY = "QUANTPLUG_DISABLE_PLUGINS"
"""Comma-separated distribution or entry-point names that are not imported; names of what is not installed are fine."""

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class AllowList:
    """The two lists, resolved to (distribution, entry point); an entry of "" is the distribution as a whole."""

    allowed: frozenset[Pair] | None
    denied: frozenset[Pair]

    @classmethod
    def read(
        cls, environ: Mapping[str, str], distributions: Sequence[Distribution], failures: Sequence[PluginFailure]
    ) -> AllowList:
        """
        Resolve both variables against what is installed, broken or not.

        A name that is a distribution's means all its entry points, else it is an entry point's.

        Raises:
            PluginError: `QP-PLUG-ALLOW` when the allow list names what is not installed, `QP-PLUG-CONFLICT` when a list
                names an entry point that several distributions have.

        """
        pairs = {(d.name, entry.name) for d in distributions for entry in d.entries}
        pairs |= {(d.name, "") for d in distributions} | {(f.distribution, f.entry) for f in failures}
        denied = frozenset(pair for name in _names(environ, DENY) for pair in _resolve(name, pairs, DENY))
        if ALLOW not in environ:
            return cls(None, denied)
        resolved = {name: _resolve(name, pairs, ALLOW) for name in _names(environ, ALLOW)}
        missing = [name for name, found in resolved.items() if not found]
        if missing:
            listing = ", ".join(sorted(f"{entry} ({distribution})" for distribution, entry in pairs if entry))
            raise PluginError(
                "QP-PLUG-ALLOW",
                ALLOW,
                f"names {', '.join(missing)}, which is not installed",
                expected=f"entry points or distributions: {listing or 'there are none'}",
                fix="; ".join(
                    ["Install it, or take it off the list", *(f"note that {failure}" for failure in failures)]
                ),
            )
        return cls(frozenset(pair for found in resolved.values() for pair in found), denied)

    def verdict(self, distribution: str, entry: str) -> str:
        """Return the variable that keeps this plugin out, "" when it may come in."""
        if (distribution, entry) in self.denied:
            return DENY
        return "" if self.allowed is None or (distribution, entry) in self.allowed else ALLOW

    def kept_out(self, distributions: Sequence[Distribution]) -> tuple[Disabled, ...]:
        """Return the plugins that do not come in."""
        return tuple(
            Disabled(distribution.name, entry.name, verdict)
            for distribution in distributions
            for entry in distribution.entries
            if (verdict := self.verdict(distribution.name, entry.name))
        )


def _names(environ: Mapping[str, str], variable: str) -> list[str]:
    return [name.strip() for name in environ.get(variable, "").split(",") if name.strip()]


def _resolve(name: str, pairs: set[Pair], variable: str) -> set[Pair]:
    key = normalise(name)
    whole = {pair for pair in pairs if normalise(pair[0]) == key}
    if whole:
        return whole
    entries = {pair for pair in pairs if pair[1] and normalise(pair[1]) == key}
    owners = sorted({distribution for distribution, _ in entries})
    if len(owners) > 1:
        raise PluginError(
            "QP-PLUG-CONFLICT",
            variable,
            f"names {name}, an entry point of {' and '.join(owners)}",
            expected="the name of one distribution",
        )
    return entries | {(owner, "") for owner in owners}
