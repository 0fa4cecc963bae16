"""
The ways in which other engines match a text of a configuration with the path of a module.

Each matcher answers whether a path is listed. Names and numbers of the originals are in the functions that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantplug_peers.expressions import any_expression, check, expression

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantplug.peers import PeerAnswer

Listed = Callable[[str], bool]
"""Whether a path is listed."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Last component of a fused layer -> those of its shards."""

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
_PREFIX = "re:"


def shards(path: str) -> list[str]:
    """Return the paths of a fused layer's shards, [] when the path is none; every occurrence is replaced, as there."""
    last = path.rpartition(".")[2]
    return [path.replace(last, shard) for shard in FUSED.get(last, ())]


def agreed(answers: Iterable[bool]) -> bool | None:
    """Return what all say, None when they differ."""
    found = set(answers)
    return found.pop() if len(found) == 1 else None


def skipped(answer: bool | None) -> PeerAnswer:
    """Return the answer of an engine whose list of layers to skip said this; None means that shards differ."""
    if answer is None:
        return "error"
    return "dense" if answer else "quantized"


def exact(entries: Sequence[str]) -> Listed:
    """Match whole paths."""
    return frozenset(entries).__contains__


def substrings(entries: Sequence[str]) -> Listed:
    """Match paths that contain a text anywhere, also within a component."""
    texts = tuple(entries)
    return lambda path: any(text in path for text in texts)


def suffixes(entries: Sequence[str]) -> Listed:
    """Match paths, and their last components."""
    whole = frozenset(entries)
    tails = tuple(f".{text}" for text in entries)
    return lambda path: path in whole or path.endswith(tails)


def component_runs(entries: Sequence[str]) -> Listed:
    """Match runs of whole components anywhere; dots at the end of an entry do not count."""
    runs = frozenset(entry.rstrip(".") for entry in entries)
    lengths: dict[str, set[int]] = {}
    for run in runs:
        lengths.setdefault(run.partition(".")[0], set()).add(run.count(".") + 1)

    def listed(path: str) -> bool:
        parts = path.rstrip(".").split(".")
        return any(
            ".".join(parts[start : start + length]) in runs
            for start, part in enumerate(parts)
            for length in lengths.get(part, ())
        )

    return listed


def exact_or_expressions(entries: Sequence[str], *, tails: bool = False) -> Listed:
    """
    Match whole paths, and `re:` expressions from the start of the path.

    Args:
        entries: the list.
        tails: whether a plain text may also be the last components.
    """
    plain = [entry for entry in entries if not entry.startswith(_PREFIX)]
    named = suffixes(plain) if tails else exact(plain)
    patterns = [expression(entry.removeprefix(_PREFIX), "match") for entry in entries if entry.startswith(_PREFIX)]
    return lambda path: named(path) or any(matches(path) for matches in patterns)


def bounded_expressions(entries: Sequence[str]) -> Listed:
    """
    Match every entry as an expression from the start of the path up to the end of a component, and as a plain tail.

    A dot then stands for any character, and a tail need not begin where a component does.
    """
    for entry in entries:
        check(entry, "fullmatch", inside=f"(?:{entry}){_BOUNDARY}")
    tails = tuple(entries)
    any_of = any_expression([f"(?:{entry}){_BOUNDARY}" for entry in entries])
    return lambda path: any_of is not None and (any_of.match(path) is not None or path.endswith(tails))


def stars(entries: Sequence[str]) -> Listed:
    """
    Match whole paths or single components, where `*` stands for any text and a dot for itself.

    What else has a meaning in expressions keeps it, as in the original.
    """
    texts = [entry.replace(".", r"\.").replace("*", ".*") for entry in entries]
    for text in texts:
        check(text, "fullmatch")
    any_of = any_expression(texts)

    def listed(path: str) -> bool:
        if any_of is None:
            return False
        names = [path, *path.split("."), path.removeprefix("language_model.")]
        return any(any_of.fullmatch(name) is not None for name in names)

    return listed


def listed_child(entries: Sequence[str]) -> Listed:
    """Match a module of experts of which any part is listed."""
    names = [entry for entry in entries if "experts" in entry]
    return lambda path: "experts" in path and any(path in name for name in names)


def with_shards(listed: Listed, path: str, *, fused_name: bool = True) -> bool | None:
    """
    Return whether a path is listed: its own name where that counts for fused layers, else all its shards.

    None means that some of its shards are and some are not.
    """
    parts = shards(path)
    if not parts:
        return listed(path)
    if fused_name and listed(path):
        return True
    return agreed(map(listed, parts))
