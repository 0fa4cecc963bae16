"""
Module names like one that nobody has: "did you mean".
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from quantplug.skip import PATTERNS, EntryKind

if TYPE_CHECKING:
    from quantplug.inventory import ModuleInfo
    from quantplug.skip import Entry

_MAX_SHAPES = 500
"""Names are compared by shape (numbers left out); a model has far fewer shapes than modules."""
_MAX_ANSWERS = 3
_NUMBER = re.compile(r"\d+")
_SYNTAX = re.compile(r"\\[A-Za-z]|\[[^\]]*\]|\([^()]*\)|[\\^$*+?{}|()\[\]]")


class NameCollection:
    """Names seen so far; nothing is compared before somebody asks."""

    def __init__(self) -> None:
        self._modules: list[ModuleInfo] = []
        self._shapes: dict[str, str] = {}
        self._read = 0

    def add(self, module: ModuleInfo) -> None:
        """Remember the names of one module."""
        self._modules.append(module)

    def nearest(self, entry: Entry) -> tuple[str, ...]:
        """Return the few names most like an entry, in the components that it has."""
        if entry.kind is EntryKind.CLASS:
            return ()
        text = entry.pattern
        if entry.kind in PATTERNS:
            text = re.sub(r"\.{2,}", ".", _SYNTAX.sub("", text)).strip(".")
        wanted = _NUMBER.sub("#", text)
        width = wanted.count(".") + 1
        runs: dict[str, str] = {}
        for shape, name in self._all_shapes().items():
            parts = shape.split(".")
            for at in range(max(len(parts) - width, 0) + 1):
                runs.setdefault(".".join(parts[at : at + width]), name)
        found = difflib.get_close_matches(wanted, runs, n=_MAX_ANSWERS)
        return tuple(dict.fromkeys(runs[run] for run in found))

    def _all_shapes(self) -> dict[str, str]:
        for module in self._modules[self._read :]:
            if len(self._shapes) >= _MAX_SHAPES:
                break
            for name in module.shards or (module.name,):
                self._shapes.setdefault(_NUMBER.sub("#", name), name)
        self._read = len(self._modules)
        return self._shapes
