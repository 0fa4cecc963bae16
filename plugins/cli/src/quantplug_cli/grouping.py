"""
Layers that share a fate, as one row: a 30-layer model fits a screen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.skip import SCHEMED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantplug.plan import LayerPlan, Plan

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Group:
    """
    Layers with the same rule, scheme, kernels and notes.

    Attributes:
        names: their paths, numbers and siblings folded ("model.layers.0-29.mlp.{gate,up}_proj").
        layers: in model order.
    """

    names: str
    layers: tuple[LayerPlan, ...]

    @property
    def first(self) -> LayerPlan:
        """The layer that speaks for the group."""
        return self.layers[0]

    @property
    def file_bytes(self) -> int:
        """Bytes in the files."""
        return sum(layer.file_bytes for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory."""
        return sum(layer.memory_bytes for layer in self.layers)


def group_layers(plan: Plan) -> list[Group]:
    """Return the groups of a plan, linear layers and experts first, in order of first appearance."""
    fates: dict[object, list[LayerPlan]] = defaultdict(list)
    for layer in plan.layers:
        decision = plan.decision_of(layer)
        kernels = decision.choices if decision is not None else ()
        runs = layer.kind in SCHEMED
        parent = _NUMBER.sub("#", layer.path).rpartition(".")[0] if runs else ""
        # The default and an expression speak of all layers alike; a literal entry names one, and folds by its words.
        rule = _NUMBER.sub("#", layer.rule)
        notes = tuple(_NUMBER.sub("#", note) for note in layer.notes)
        fates[(not runs, layer.kind, rule, layer.scheme, kernels, notes, parent)].append(layer)
    groups = [Group(fold([layer.path for layer in layers]), tuple(layers)) for layers in fates.values()]
    return sorted(groups, key=lambda group: (group.first.kind not in SCHEMED, not group.first.quantized))


def fold(paths: Sequence[str]) -> str:
    """Return paths in short: runs of numbers as ranges, last names that differ in braces."""
    patterns: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        numbers = _NUMBER.findall(path)
        pattern = _NUMBER.sub("#", path)
        patterns[pattern].append(int(numbers[0]) if len(numbers) == 1 else -1)
    by_parent: dict[tuple[str, str], list[str]] = defaultdict(list)
    for pattern, numbers in patterns.items():
        parent, _, last = pattern.rpartition(".")
        shown = ranges(numbers) if -1 not in numbers else "*"
        by_parent[(parent.replace("#", shown), shown)].append(last.replace("#", shown))
    folded = [f"{parent}.{braces(lasts)}" if parent else braces(lasts) for (parent, _), lasts in by_parent.items()]
    return ", ".join(folded) if len(folded) <= 3 else f"{', '.join(folded[:2])} and {len(folded) - 2} more"


def ranges(numbers: Iterable[int]) -> str:
    """Return `0-3,7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def braces(names: Sequence[str]) -> str:
    """Return `{gate,up}_proj` for gate_proj, up_proj."""
    if len(names) == 1:
        return names[0]
    tail = _common_tail(names)
    return "{" + ",".join(name[: len(name) - len(tail)] for name in names) + "}" + tail


def _common_tail(names: Sequence[str]) -> str:
    tail = names[0]
    while not all(name.endswith(tail) and name != tail for name in names):
        cut = tail.find("_", 1)
        tail = tail[cut:] if cut > 0 else ""
        if not tail:
            break
    return tail
