"""
Which of many entries match a name, without asking each of them.

Entries that are paths lie in dictionaries by their text; a name asks for those of its own parts that some entry could
be. So the time is linear in entries plus names. Globs and expressions are asked one by one, but those that begin with
literal text only when the name begins so, too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.patterns import MAX_NAME, check_name, compile_glob, examine
from quantplug.skip import PATTERNS, EntryKind

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Sequence

    from quantplug.patterns import Vetted
    from quantplug.skip import Entry

MAX_PATTERNS = 4_096
"""Globs and expressions in one configuration."""
MAX_LITERALS = 1_000_000
"""Other entries in one configuration."""
MATCH_SECONDS = 30.0
"""Time for matching all names of one model; real ones need milliseconds, or seconds with many expressions."""
_COSTLY_STEPS = 100_000
"""From here on (about a millisecond on the longest name) the clock is looked at before an expression runs."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    index: int
    accepts: Callable[[str], re.Match[str] | None]
    steps: int


class _Runs:
    """Entries that are runs of whole components, by text; and how long those are that begin (or end) with a word."""

    def __init__(self) -> None:
        self._indices: dict[str, list[int]] = {}
        self._lengths: dict[str, set[int]] = {}

    def add(self, text: str, index: int, key: int) -> None:
        """Add an entry under its first (`key` 0) or last (-1) component."""
        self._indices.setdefault(text, []).append(index)
        parts = text.split(".")
        lengths = self._lengths.get(parts[key])
        if lengths is None:
            self._lengths[parts[key]] = {len(parts)}
        else:
            lengths.add(len(parts))

    def starting(self, parts: Sequence[str], at: int, found: list[int]) -> None:
        """Add to `found` the entries that are runs of `parts` from `at` on."""
        for length in self._lengths.get(parts[at], ()):
            if at + length <= len(parts):
                found += self._indices.get(".".join(parts[at : at + length]), ())

    def ending(self, parts: Sequence[str], found: list[int]) -> None:
        """Add the entries that are the last of `parts`."""
        for length in self._lengths.get(parts[-1], ()):
            if length <= len(parts):
                found += self._indices.get(".".join(parts[len(parts) - length :]), ())

    def anywhere(self, parts: Sequence[str], found: list[int]) -> None:
        """Add the entries that are runs of `parts`, as often as they occur."""
        lengths = self._lengths
        if lengths.keys().isdisjoint(parts):
            return
        for at, part in enumerate(parts):
            if part in lengths:
                self.starting(parts, at, found)


class RuleIndex:
    """
    Entries, indexed once; `hits` answers for one name at a time. Not for use by several threads at once.

    Args:
        entries: in the order of their rules.
        seconds: time that all calls of `hits` together may take.

    Raises:
        ConfigError: `QP-SKIP-PATTERN` for a pattern that may not run, or for more entries than `MAX_…` allow.

    """

    def __init__(self, entries: Sequence[Entry], seconds: float = MATCH_SECONDS) -> None:
        self._seconds = seconds
        self._vetted: dict[int, Vetted] = {}
        self._exact: dict[str, list[int]] = {}
        self._classes: dict[str, list[int]] = {}
        self._parents, self._suffixes, self._components = _Runs(), _Runs(), _Runs()
        self._patterns: list[_Pattern] = []
        self._headed: dict[str, list[_Pattern]] = {}
        self._spent = 0.0
        self._names = 0
        self._check_counts(entries)
        for index, entry in enumerate(entries):
            self._add(index, entry)

    def hits(self, name: str, class_name: str = "") -> list[int]:
        """
        Return the positions of the entries that match a name, ascending.

        Raises:
            CheckpointError: `QP-ST-NAME` for a name that is too long or has control characters.
            ConfigError: `QP-SKIP-PATTERN` when matching has used up its time.

        """
        started = time.perf_counter()
        check_name(name)
        parts = name.split(".")
        found: list[int] = []
        self._components.anywhere(parts, found)
        self._parents.starting(parts, 0, found)
        self._suffixes.ending(parts, found)
        if name in self._exact:
            found += self._exact[name]
        if class_name in self._classes:
            found += self._classes[class_name]
        if self._patterns:
            self._ask(self._patterns, name, started, found)
        if self._headed:
            for length in range(1, len(parts) + 1):
                bucket = self._headed.get(".".join(parts[:length]))
                if bucket:
                    self._ask(bucket, name, started, found)
        self._names += 1
        self._spent += time.perf_counter() - started
        if self._spent > self._seconds:
            raise self._too_slow()
        return sorted(set(found)) if len(found) > 1 else found

    def _ask(self, patterns: list[_Pattern], name: str, started: float, found: list[int]) -> None:
        for pattern in patterns:
            if pattern.steps > _COSTLY_STEPS and self._spent + time.perf_counter() - started > self._seconds:
                raise self._too_slow()
            if pattern.accepts(name):
                found.append(pattern.index)

    def _add(self, index: int, entry: Entry) -> None:
        if entry.kind is EntryKind.COMPONENT:
            self._components.add(entry.pattern, index, 0)
        elif entry.kind is EntryKind.EXACT:
            self._exact.setdefault(entry.pattern, []).append(index)
        elif entry.kind is EntryKind.CLASS:
            self._classes.setdefault(entry.pattern, []).append(index)
        elif entry.kind is EntryKind.PARENT:
            self._parents.add(entry.pattern, index, 0)
        elif entry.kind is EntryKind.SUFFIX:
            self._suffixes.add(entry.pattern, index, -1)
        else:
            if entry.kind in (EntryKind.GLOB, EntryKind.GLOB_PARENT):
                vetted = compile_glob(entry.pattern, entry.origin, below=entry.kind is EntryKind.GLOB_PARENT)
            else:
                vetted = examine(entry.pattern, entry.origin, entry.regex_mode)
            self._vetted[index] = vetted
            # The last component of literal text may go on in the name, so only what stands before it is sure.
            head = vetted.head.rpartition(".")[0]
            bucket = self._headed.setdefault(head, []) if head else self._patterns
            bucket.append(_Pattern(index, vetted.accepts, vetted.steps))

    def _check_counts(self, entries: Sequence[Entry]) -> None:
        patterns = sum(entry.kind in PATTERNS for entry in entries)
        for count, limit, what in (
            (patterns, MAX_PATTERNS, "globs and expressions"),
            (len(entries) - patterns, MAX_LITERALS, "entries"),
        ):
            if count > limit:
                raise ConfigError(
                    "QP-SKIP-PATTERN",
                    entries[0].origin,
                    f"{count:,} {what} in one configuration",
                    expected=f"at most {limit:,}",
                    fix="Say it with fewer entries; a parent path covers everything below it.",
                )

    def _too_slow(self) -> ConfigError:
        slowest = max(self._vetted.values(), key=lambda vetted: vetted.steps, default=None)
        return ConfigError(
            "QP-SKIP-PATTERN",
            f"after {self._names:,} module names",
            f"matching has taken {self._seconds:g} s"
            + (f"; the costliest of {len(self._vetted)} patterns is {slowest.regex.pattern!r}" if slowest else ""),
            expected=f"rules that are matched within that time on names of up to {MAX_NAME} characters",
            fix="Use fewer patterns, or paths in their place.",
        )
