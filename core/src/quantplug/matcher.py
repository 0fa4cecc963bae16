"""
The one skip matcher: the first rule that matches a module decides, and every rule's effect is counted.

Matching is in checkpoint names. A fused module is stored as shards, so it is their names that rules speak of; an entry
that matches the fused name itself speaks for every shard. Each shard is decided by the first entry that speaks for it,
and all shards that the checkpoint has must come to the same scheme. Experts are fused modules in this sense.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.nearest import NameCollection
from quantplug.readings import may_surprise, surprises
from quantplug.ruleindex import RuleIndex
from quantplug.skip import MAX_REPORTED, SCHEMED, EntryUse, RuleReport, Ruling

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from quantplug.inventory import ModuleInfo
    from quantplug.skip import Entry, Rule, SchemeRef

_MAX_LISTED = 8
"""Shards that an error lists for each scheme they come to."""


class Matcher:
    """
    Decides modules by ordered rules. One matcher serves one plan, on one thread.

    Args:
        rules: ordered; the first whose entry matches decides.
        default: the scheme of linear modules that no rule touches, or None.

    Raises:
        ConfigError: `QP-SKIP-PATTERN` for a pattern that may not run, or for too many entries.

    """

    def __init__(self, rules: Sequence[Rule], default: SchemeRef | None) -> None:
        self._rules = tuple(rules)
        self._default = default
        self._index = RuleIndex([rule.entry for rule in self._rules])
        self._matched = [0] * len(self._rules)
        self._decided = [0] * len(self._rules)
        self._seen: set[str] = set()
        self._names = NameCollection()
        self._plain: dict[int | None, Ruling] = {None: Ruling(default, None)}

    def decide(self, module: ModuleInfo, stored: Collection[str] | None = None, *, split: bool = False) -> Ruling:
        """
        Return what a module gets, and why. A module is counted once, however often it is asked for.

        Only linear modules and experts are given schemes; for others the ruling names the rule that keeps them whole,
        if any.

        Args:
            module: the module; its shards are checkpoint paths.
            stored: paths of the modules that the checkpoint has tensors for (a set); a shard without tensors cannot
                disagree. None means that all are there.
            split: whether the shards of such a module may come to different schemes, because the caller asks their
                tensors; the ruling then has one for each (`Ruling.split`).

        Raises:
            ConfigError: `QP-SKIP-SHARDS` when stored shards come to different schemes; `QP-SKIP-PATTERN` when matching
                takes too long.
            CheckpointError: `QP-ST-NAME` for a name that is too long or has control characters.

        """
        own = self._index.hits(module.name, module.class_name)
        if module.shards:
            shards = [shard for shard in module.shards if stored is None or shard in stored]
            if shards:
                return self._decide_shards(module, own, shards, split and module.kind in SCHEMED)
        decider = own[0] if own else None
        self._count(module, own, own[:1])
        if module.kind in SCHEMED:
            ruling = self._plain.get(decider)
            if ruling is not None:
                return ruling
        ruling = self._ruling(module, {module.name: decider})
        if decider is not None and module.kind in SCHEMED and not may_surprise(self._rules[decider].entry):
            self._plain[decider] = ruling  # the same for every module that this rule decides
        return ruling

    def otherwise(self, module: ModuleInfo, shard: str) -> SchemeRef | None:
        """
        Return the scheme of a layer that a rule keeps whole, if its tensors say that the rule is wrong about it.

        That is what the first rule that speaks for it and assigns one says, else the default; else any there is, by
        which tensors can at least be judged. None when nothing is quantized at all.
        """
        hits = sorted({*self._index.hits(module.name, module.class_name), *self._index.hits(shard)})
        given = (self._rules[index].use for index in (*hits, *range(len(self._rules) if self._default is None else 0)))
        return next((use for use in given if use is not None), self._default)

    def report(self) -> RuleReport:
        """Return what every rule did so far, in rule order."""
        uses, asked = [], 0
        for rule, matched, decided in zip(self._rules, self._matched, self._decided, strict=True):
            nearest: tuple[str, ...] = ()
            if not matched and not rule.entry.implied and asked < MAX_REPORTED:
                asked += 1
                nearest = self._names.nearest(rule.entry)
            uses.append(EntryUse(rule.entry, matched, decided, nearest))
        return RuleReport(tuple(uses))

    def _decide_shards(self, module: ModuleInfo, own: list[int], shards: list[str], split: bool) -> Ruling:
        matched = set(own)
        deciders: dict[str, int | None] = {}
        for shard in shards:
            hits = self._index.hits(shard)
            matched.update(hits)
            deciders[shard] = min((*own[:1], *hits[:1]), default=None)
        agreed = len({self._use(decider) for decider in deciders.values()}) == 1
        if not agreed and not split:
            raise disagreement(module, self._split(deciders))
        self._count(module, matched, {decider for decider in deciders.values() if decider is not None})
        return self._ruling(module, deciders) if agreed else self._split(deciders)

    def _ruling(self, module: ModuleInfo, deciders: dict[str, int | None]) -> Ruling:
        """Return the ruling of a module whose parts agree, given who decided each."""
        distinct = sorted({decider for decider in deciders.values() if decider is not None})
        rule = self._rules[distinct[0]] if distinct else None
        use = self._use(distinct[0] if distinct else None)
        if module.kind not in SCHEMED:
            return Ruling(None, rule if rule is not None and rule.use is None else None)
        shards: tuple[tuple[str, str], ...] = ()
        if len(set(deciders.values())) > 1:
            shards = tuple((name, self._words(decider)) for name, decider in deciders.items())
        return Ruling(use, rule, shards, self._surprises(deciders))

    def _split(self, deciders: dict[str, int | None]) -> Ruling:
        """Return the ruling of a module whose shards disagree."""
        parts = tuple(
            (name, Ruling(self._use(decider), None if decider is None else self._rules[decider]))
            for name, decider in deciders.items()
        )
        shards = tuple((name, self._words(decider)) for name, decider in deciders.items())
        return Ruling(None, None, shards, self._surprises(deciders), parts)

    def _surprises(self, deciders: dict[str, int | None]) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(
                text
                for name, decider in deciders.items()
                if decider is not None
                for text in surprises(self._rules[decider].entry, name)
            )
        )

    def _use(self, decider: int | None) -> SchemeRef | None:
        return self._default if decider is None else self._rules[decider].use

    def _words(self, decider: int | None) -> str:
        return "default" if decider is None else self._rules[decider].entry.text

    def _count(self, module: ModuleInfo, matched: Iterable[int], deciding: Iterable[int]) -> None:
        if module.path in self._seen:
            return
        self._seen.add(module.path)
        self._names.add(module)
        for index in matched:
            self._matched[index] += 1
        if module.kind in SCHEMED:
            for index in deciding:
                self._decided[index] += 1


def disagreement(module: ModuleInfo, ruling: Ruling) -> ConfigError:
    """Return the error about a module whose shards come to different schemes, naming each shard and its rule."""
    groups: dict[SchemeRef | None, list[str]] = {}
    for name, part in ruling.split:
        entry = None if part.rule is None else part.rule.entry
        said = "by default" if entry is None else f"by {entry.text!r} ({entry.origin})"
        groups.setdefault(part.use, []).append(f"{name} {said}")
    told = []
    for use, names in groups.items():
        more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
        told.append(f"{_describe(use)}: {', '.join(names[:_MAX_LISTED])}{more}")
    return ConfigError(
        "QP-SKIP-SHARDS",
        module.path,
        "its shards come to different schemes; " + "; ".join(told),
        expected="all shards of a fused module, and all experts of a layer, skipped alike or quantized alike",
        fix="List every shard or none, or run the model with these layers unfused.",
    )


def matches(entry: Entry, module: ModuleInfo) -> bool:
    """
    Return whether one entry covers a module: its own name, or the names of all its shards.

    Raises:
        ConfigError: `QP-SKIP-PATTERN` for a pattern that may not run.

    """
    index = _index_of(entry)
    if index.hits(module.name, module.class_name):
        return True
    return bool(module.shards) and all(index.hits(shard) for shard in module.shards)


@lru_cache(maxsize=1024)
def _index_of(entry: Entry) -> RuleIndex:
    return RuleIndex((entry,), seconds=inf)  # kept for the whole process, and every single match is bounded


def _describe(use: SchemeRef | None) -> str:
    if use is None:
        return "kept whole"
    return " ".join((use.name, *(f"{name}={value}" for name, value in use.params)))
