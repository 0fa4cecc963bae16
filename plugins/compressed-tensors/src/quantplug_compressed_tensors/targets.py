"""
Which group decides a layer: targets of all groups as ordered rules, whatever the order of the groups in the file.

A layer's name wins over expressions, and those over class names. Among expressions that match one layer, the first by
text wins, which is how compressed_tensors sorts them (`match_targets`). Nothing depends on the order of
`config_groups`, which is lost when a writer sorts keys; what would, the same target in two groups, is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.skip import EntryKind, Rule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug.skip import Entry, SchemeRef

LINEAR = "Linear"
"""The class that stands for every linear layer."""
_RANK = {EntryKind.SUFFIX: 0, EntryKind.REGEX: 1, EntryKind.CLASS: 2}


def ordered_rules(targets: Iterable[tuple[Entry, SchemeRef | None]]) -> tuple[Rule, ...]:
    """
    Return one rule per distinct target: names, those with the most components first; expressions; class names.

    Raises:
        ConfigError: `QP-CFG-CONTRADICTION` when one target has different schemes, with both places.
    """
    seen: dict[tuple[EntryKind, str], Rule] = {}
    for entry, use in targets:
        rule = seen.setdefault((entry.kind, entry.pattern), Rule(entry, use))
        if rule.use != use:
            raise ConfigError(
                "QP-CFG-CONTRADICTION",
                entry.origin,
                f"the target {entry.text!r} is also that of {rule.entry.origin}, with other parameters",
                expected="every target in one group, or in groups that agree",
                fix="Which group counts would depend on the order of keys in the file; take the target out of one.",
            )
    return tuple(sorted(seen.values(), key=_place))


def default_of(rules: Iterable[Rule]) -> SchemeRef | None:
    """Return what linear layers of whatever class get: the scheme of the target "Linear"."""
    return next((r.use for r in rules if r.entry.kind is EntryKind.CLASS and r.entry.pattern == LINEAR), None)


def _place(rule: Rule) -> tuple[int, int, str]:
    entry = rule.entry
    components = entry.pattern.count(".") if entry.kind is EntryKind.SUFFIX else 0
    return _RANK[entry.kind], -components, entry.text
