"""
Renaming the modules of a checkpoint to those of an engine, by declared rules that cannot run in a circle.

A rule replaces whole components of a dotted path, wherever they stand or at the beginning only. Rules are applied until
none applies any more, so that a name that was mapped already is left as it is. Where a rule's new components contain
the old ones (`experts` → `moe.experts`), old ones that stand within new ones are in their place and are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quantplug.errors import PluginError


@dataclass(frozen=True, slots=True)
class Rename:
    """
    One rule.

    Attributes:
        old: dotted components to be replaced ("block_sparse_moe").
        new: dotted components that take their place ("mlp"); "" removes them.
        start: whether the old ones count at the beginning of a path only.
    """

    old: str
    new: str
    start: bool = False

    @property
    def olds(self) -> tuple[str, ...]:
        """The components to be replaced."""
        return tuple(self.old.split("."))

    @property
    def news(self) -> tuple[str, ...]:
        """The components that take their place."""
        return tuple(self.new.split(".")) if self.new else ()


@dataclass(frozen=True)
class NameMap:
    """
    Renaming rules, applied to a path until none applies: twice is once.

    Raises:
        PluginError: `QP-PLUG-RENAME` for a rule that is malformed, or that could make work for itself or for one
            before it without end.

    Attributes:
        rules: in the order in which they are tried.
    """

    rules: tuple[Rename, ...] = ()
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for rule in self.rules:
            if not all((*rule.olds, *rule.news)) or rule.olds == rule.news:
                raise PluginError(
                    "QP-PLUG-RENAME",
                    f"{rule.old!r} -> {rule.new!r}",
                    "is no renaming of components",
                    expected="components between single dots, the old ones not those that replace them",
                )
        circle = _circle(self.rules)
        if circle:
            raise PluginError(
                "QP-PLUG-RENAME",
                ", ".join(f"{rule.old!r} -> {rule.new!r}" for rule in circle),
                "could be applied for ever: what one of them writes, another one (or the same) may have to replace",
                expected="rules whose new components are no work for themselves, nor for rules that lead back to them",
                fix="Say more of the path in the old components, or bind the rule to the start of the path.",
            )

    def __call__(self, path: str) -> str:
        """Return what a module path or tensor name of a checkpoint is called in the engine."""
        if not self.rules:
            return path
        if path not in self._known:
            self._known[path] = ".".join(self._renamed(tuple(path.split("."))))
        return self._known[path]

    def _renamed(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        while True:
            for rule in self.rules:
                place = _place(parts, rule)
                if place is not None:
                    parts = (*parts[:place], *rule.news, *parts[place + len(rule.olds) :])
                    break
            else:
                return parts


def _place(parts: tuple[str, ...], rule: Rename) -> int | None:
    """Return where a rule applies first, None where it does not."""
    olds, news = rule.olds, rule.news
    if olds[0] not in parts:
        return None
    last = 0 if rule.start else len(parts) - len(olds)
    return next(
        (
            place
            for place in range(last + 1)
            if parts[place : place + len(olds)] == olds and not _within(parts, place, olds, news, start=rule.start)
        ),
        None,
    )


def _within(parts: tuple[str, ...], place: int, olds: tuple[str, ...], news: tuple[str, ...], *, start: bool) -> bool:
    """Whether old components lie within an occurrence of the new ones."""
    first = max(0, place + len(olds) - len(news))
    places = range(first, place + 1) if not start else range(first, 1)
    return any(parts[at : at + len(news)] == news for at in places) if len(news) >= len(olds) else False


def _circle(rules: tuple[Rename, ...]) -> tuple[Rename, ...]:
    """
    Return rules that could be applied without end, () when there are none.

    One rule leads to another when its new components could become part of what the other replaces, or when it replaces
    part of what keeps the other from applying. In an order in which rules lead to later ones only, each is applied a
    bounded number of times for what stands there when those before it are done. A rule may lead to itself if it
    shortens the path.
    """
    leads = {
        rule: [
            other for other in rules if _leads(rule, other) and not (rule == other and len(rule.news) < len(rule.olds))
        ]
        for rule in rules
    }
    done: set[Rename] = set()

    def visit(rule: Rename, above: tuple[Rename, ...]) -> tuple[Rename, ...]:
        if rule in above:
            return above[above.index(rule) :]
        if rule in done:
            return ()
        found = next((circle for other in leads[rule] if (circle := visit(other, (*above, rule)))), ())
        done.add(rule)
        return found

    return next((circle for rule in rules if (circle := visit(rule, ()))), ())


def _leads(rule: Rename, other: Rename) -> bool:
    """Whether a path to which `rule` was applied may need `other` for what was done to it."""
    if not rule.news and (len(other.olds) > 1 or other.start):
        return True  # what stood apart now stands together, or first
    writes = any(
        not _kept(rule.news, at, other)
        for at in _overlaps(rule.news, other.olds, start=rule.start, other_start=other.start)
    )
    guarded = len(other.news) >= len(other.olds) and _inside(other.olds, other.news)
    frees = rule != other and guarded and bool(_overlaps(rule.olds, other.news, start=False, other_start=False))
    return writes or frees


def _kept(news: tuple[str, ...], at: int, other: Rename) -> bool:
    """Whether the old components of a rule, at a place of what another one writes, are in their place there."""
    inside = 0 <= at <= len(news) - len(other.olds)
    return inside and _within(news, at, other.olds, other.news, start=False) and not other.start


def _overlaps(one: tuple[str, ...], two: tuple[str, ...], *, start: bool, other_start: bool) -> list[int]:
    """
    Return where `two` may stand, counted from the beginning of `one`, if both are in one path and share components.

    Args:
        one: components.
        two: components.
        start: whether `one` stands at the beginning of the path.
        other_start: whether `two` does.
    """
    return [
        at
        for at in range(0 if start else 1 - len(two), 1 if other_start else len(one))
        if all(one[number] == two[number - at] for number in range(max(0, at), min(len(one), at + len(two))))
    ]


def _inside(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))
