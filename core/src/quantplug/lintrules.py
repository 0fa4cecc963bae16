"""
Entries, rules and shards: what the configuration says against what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.findings import Finding
from quantplug.names import GENERIC
from quantplug.skip import MAX_REPORTED, SCHEMED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from quantplug.inventory import ModuleInfo
    from quantplug.plan import LayerPlan
    from quantplug.skip import Entry, RuleReport, Ruling

SHOWN = 5
"""Names that a finding lists."""


@dataclass(frozen=True, slots=True)
class Decided:
    """
    One module and what was decided about it.

    Attributes:
        module: the module.
        ruling: what the rules say; None when they cannot be followed.
        layer: its plan; None when it cannot be planned.
    """

    module: ModuleInfo
    ruling: Ruling | None
    layer: LayerPlan | None

    @property
    def overruled(self) -> bool:
        """Whether the stored tensors say otherwise than the rules."""
        if self.ruling is None or self.layer is None or self.module.kind not in SCHEMED or self.module.tied_to:
            return False
        rulings = [part for _, part in self.ruling.split] or [self.ruling]
        return any(self.layer.quantized != (ruling.use is not None) for ruling in rulings)

    @property
    def entry(self) -> Entry | None:
        """The entry that decided, None where the default did."""
        return self.ruling.rule.entry if self.ruling is not None and self.ruling.rule is not None else None


def check_entries(report: RuleReport, decided: Sequence[Decided]) -> Iterator[Finding]:
    """Yield entries that match nothing, and those that were read otherwise than their text suggests."""
    for number, entry in enumerate(report.unused):
        if number == MAX_REPORTED:
            more = len(report.unused) - number
            yield Finding("QP-LINT-UNUSED", "warning", entry.origin, f"{more:,} more entries match no module")
            break
        nearest = next(use.nearest for use in report.uses if use.entry == entry)
        yield Finding(
            "QP-LINT-UNUSED",
            "warning",
            entry.origin,
            f"{entry.text!r} matches no module",
            f"The nearest names are {', '.join(nearest)}." if nearest else "Take it out, or correct its spelling.",
        )
    told: dict[tuple[Entry | None, str], list[str]] = {}
    for item in decided:
        for text in item.ruling.warnings if item.ruling is not None else ():
            told.setdefault((item.entry, text), []).append(item.module.path)
    for (decider, text), names in told.items():
        where = decider.origin if decider is not None else ""
        yield Finding("QP-LINT-READING", "warning", where, text, "", tuple(names[:SHOWN]), len(names))


def check_evidence(decided: Sequence[Decided]) -> Iterator[Finding]:
    """Yield, for every entry and for the default, the modules whose stored tensors contradict it."""
    against: dict[tuple[Entry | None, bool], list[str]] = {}
    agreeing: dict[Entry | None, int] = {}
    for item in decided:
        if item.overruled and item.layer is not None:
            against.setdefault((item.entry, item.layer.quantized), []).append(item.module.path)
        elif item.module.kind in SCHEMED and item.layer is not None:
            agreeing[item.entry] = agreeing.get(item.entry, 0) + 1
    for (entry, quantized), names in against.items():
        right = agreeing.get(entry, 0)
        said = f"{entry.text!r}" if entry is not None else "the default"
        stored, asked = ("quantized", "whole") if quantized else ("dense", "quantized")
        fix = (
            f"It is right about {right} other layer(s), so it matches too much; name those only."
            if right and entry is not None
            else f"Say in the configuration that {'they are quantized' if quantized else 'they stayed whole'}."
        )
        yield Finding(
            "QP-SKIP-EVIDENCE",
            "error",
            entry.origin if entry is not None else "default",
            f"{said} says {asked}, but {len(names)} layer(s) are stored {stored}",
            fix,
            tuple(names[:SHOWN]),
            len(names),
        )


def check_shards(decided: Sequence[Decided]) -> Iterator[Finding]:
    """
    Yield the shards that engines run as one layer and that are stored in different ways.

    They run here, each in its own way; an engine that fuses them cannot load them.
    """
    groups: dict[str, list[str]] = {}
    for fused, parts in fused_layers(decided).items():
        ways = {_way(item) for item in parts}
        if len(ways) > 1 and None not in ways:
            words = sorted({f"{item.module.path.rpartition('.')[2]}: {_way(item)}" for item in parts})
            groups.setdefault("; ".join(words), []).append(fused)
    for told, names in groups.items():
        yield Finding(
            "QP-LINT-SHARDS",
            "warning",
            names[0],
            f"its shards are stored in different ways ({told})",
            "Engines that run them as one layer refuse this; quantize all shards alike, or none.",
            tuple(names[:SHOWN]),
            len(names),
        )


def fused_layers(decided: Iterable[Decided]) -> dict[str, list[Decided]]:
    """Return the layers that engines fuse, by the path of the fused one; only those all of whose shards are there."""
    linear = {item.module.path: item for item in decided if item.module.kind == "linear" and not item.module.shards}
    found: dict[str, list[Decided]] = {}
    for name, shards in GENERIC.fused:
        for path in linear:
            parent, dot, last = path.rpartition(".")
            if last != shards[0]:
                continue
            parts = [linear.get(f"{parent}{dot}{shard}") for shard in shards]
            if all(part is not None for part in parts):
                found[f"{parent}{dot}{name}"] = [part for part in parts if part is not None]
    return found


def _way(item: Decided) -> str | None:
    """Return in words how a shard is stored, None when that is not known."""
    if item.layer is None:
        return None
    return item.layer.scheme or "dense"
