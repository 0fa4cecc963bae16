"""
The one skip matcher: which rule decides a module, and which rules never did anything.

A dialect turns its lists into typed entries; matching is always in checkpoint names and on dot boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quantplug.jsonio import Json


MAX_REPORTED = 20
"""Unused entries that a report describes one by one."""

SCHEMED = ("linear", "experts")
"""Kinds of modules that a rule or a default gives a scheme."""


class EntryKind(StrEnum):
    """How an entry's text is compared with a module's checkpoint path."""

    EXACT = "exact"
    """The whole path."""
    SUFFIX = "suffix"
    """The last components: `mlp.gate` is `model.layers.0.mlp.gate`, never `mlp.gate_up_proj`."""
    PARENT = "parent"
    """The path itself or any path below it: `model.layers.34` covers `model.layers.34.mlp`, never `layers.340`."""
    COMPONENT = "component"
    """A run of whole components anywhere: `self_attn` covers `model.layers.0.self_attn.o_proj`."""
    CLASS = "class"
    """The module's class name."""
    GLOB = "glob"
    """Shell-style `*`, `?`, `[…]` over the whole path (`*` crosses dots)."""
    GLOB_PARENT = "glob-parent"
    """The same over the path itself or any path above it: `layers.*.mlp` covers `layers.0.mlp.gate`."""
    REGEX = "regex"
    """A vetted regular expression, compared as `regex_mode` says."""


PATTERNS = frozenset({EntryKind.GLOB, EntryKind.GLOB_PARENT, EntryKind.REGEX})
"""Kinds whose entries are compiled."""

RegexMode = Literal["match", "fullmatch", "search"]


@dataclass(frozen=True, slots=True)
class Entry:
    """
    One typed entry of a list or mapping in a configuration.

    Attributes:
        text: as the file spells it, for people.
        kind: how it is compared.
        pattern: what is compared: the path without a trailing dot, the glob, or the expression without its prefix.
        origin: where it stands ("config.json: quantization_config.dynamic[0]").
        regex_mode: for REGEX, how that format's own reader applies it.
        implied: a dialect's own default rather than words of the file; such an entry is never reported as unused.

    """

    text: str
    kind: EntryKind
    pattern: str
    origin: str
    regex_mode: RegexMode = "match"
    implied: bool = False


@dataclass(frozen=True, slots=True)
class SchemeRef:
    """
    A scheme by name, with its parameters: what a rule or a default assigns to a layer.

    Attributes:
        name: key among installed schemes.
        params: sorted (name, value) pairs of plain JSON scalars.

    """

    name: str
    params: tuple[tuple[str, Json], ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """
    An entry and what it does: keep the module whole (`use` is None) or give it a scheme.

    Rules are ordered; the first one whose entry matches decides.
    """

    entry: Entry
    use: SchemeRef | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """
    The answer for one module.

    Attributes:
        use: the scheme it gets, or None when it stays whole.
        rule: the rule that decided, or None when the default did.
        shards: for a fused module decided by its shards, (shard path, deciding entry text) each.
        warnings: what a reader should know ("`layers.3.` is read as the parent path `layers.3`").
        split: for a fused module whose shards come to different schemes, (shard path, its own ruling) each; `use` and
            `rule` say nothing then, and only the stored tensors can decide.

    """

    use: SchemeRef | None
    rule: Rule | None
    shards: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    split: tuple[tuple[str, Ruling], ...] = ()

    def of(self, shard: str) -> Ruling:
        """Return the ruling of one shard: its own where the rules disagree, else that of the module."""
        return dict(self.split).get(shard, self)


@dataclass(frozen=True, slots=True)
class EntryUse:
    """
    What one entry did.

    Attributes:
        entry: the entry.
        matched: how many modules it matched, by their own name or by a shard's.
        decided: how many of them it decided.
        nearest: module names like it, when it matched none (found for the first few such entries only).

    """

    entry: Entry
    matched: int
    decided: int
    nearest: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What every entry of a configuration did; `unused` are those of the file that matched nothing."""

    uses: tuple[EntryUse, ...] = field(default=())

    @property
    def unused(self) -> tuple[Entry, ...]:
        """Entries of the file (not implied ones) that matched no module."""
        return tuple(use.entry for use in self._unused())

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each of the first unused entries, with the nearest module names, and one for the rest."""
        unused = self._unused()
        said = [
            f"{use.entry.text!r} ({use.entry.origin}) matches no module"
            + (f"; the nearest names are {', '.join(use.nearest)}" if use.nearest else "")
            for use in unused[:MAX_REPORTED]
        ]
        more = len(unused) - len(said)
        return (*said, f"{more:,} more entries match no module") if more else tuple(said)

    def _unused(self) -> list[EntryUse]:
        return [use for use in self.uses if use.matched == 0 and not use.entry.implied]
