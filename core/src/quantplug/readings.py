"""
What a reader should know about how an entry was read: the readings that surprise people, in words.
"""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache

from quantplug.patterns import examine, split_gaps
from quantplug.skip import PATTERNS, Entry, EntryKind

ROOTS = frozenset(
    {
        "model", "language_model", "text_model", "base_model", "transformer", "decoder", "backbone", "module", "llm",
        "gpt_neox",
    }
)  # fmt: skip
"""First components below which a whole language model lies."""


def may_surprise(entry: Entry) -> bool:
    """Return whether `surprises` might say anything about an entry."""
    return entry.text != entry.pattern or entry.pattern in ROOTS or entry.kind in PATTERNS


def surprises(entry: Entry, name: str) -> tuple[str, ...]:
    """Return sentences about how an entry came to match a name, usually none."""
    said = []
    if _trailing_dot(entry):
        said.append(f"{entry.text!r} is read as the parent path {entry.pattern!r}: that module and all below it")
    if entry.kind in (EntryKind.PARENT, EntryKind.COMPONENT) and name.startswith(f"{entry.pattern}."):
        if entry.pattern in ROOTS:
            said.append(f"{entry.text!r} is the root of the model: it covers every module below it")
    elif entry.kind in PATTERNS:
        number = _cut_number(entry, name)
        if number:
            said.append(
                f"{entry.text!r} ends inside the number {number} of {name!r}: it covers every number that begins so"
            )
    return tuple(said)


def _trailing_dot(entry: Entry) -> bool:
    return entry.kind in (EntryKind.PARENT, EntryKind.COMPONENT) and entry.text.rstrip().endswith(".")


def _cut_number(entry: Entry, name: str) -> str:
    """Return the number in `name` that the last character of a pattern's match falls within, or ""."""
    stem = _stem(entry)
    found = stem.match(name) if stem else None
    if found is None or not name[: found.end()][-1:].isdigit() or not name[found.end() :][:1].isdigit():
        return ""
    digits = re.compile(r"\d+")
    return next(m[0] for m in digits.finditer(name) if m.start() < found.end() < m.end())


@lru_cache(maxsize=8192)
def _stem(entry: Entry) -> re.Pattern[str] | None:
    """Return a pattern without the gap at its end; None when it has none and the whole name must match."""
    if entry.kind is not EntryKind.REGEX:
        stem = entry.pattern.rstrip("*")
        return None if stem == entry.pattern else re.compile(fnmatch.translate(stem)[: -len(r"\Z")])
    pieces = split_gaps(entry.pattern)
    if pieces and len(pieces) > 1 and not pieces[-1]:
        stem = entry.pattern.removesuffix("?").removesuffix(".*")
        return examine(stem, entry.origin, "search" if entry.regex_mode == "search" else "match").regex
    return None if entry.regex_mode == "fullmatch" else examine(entry.pattern, entry.origin, entry.regex_mode).regex
