"""
What a model card says about the grid that dense weights were trained for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

CARD = "card"
"""The recipe that stands for whichever one the model card names."""

FILE = "README.md"

_MOST_BYTES = 1 << 16
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


def recipes_on_card(directory: Path, recipes: Collection[str]) -> tuple[str, ...]:
    """
    Return the recipes that stand as words in the metadata of the model card (the block between `---` lines), sorted.

    Metadata only: prose mentions formats for many reasons.
    """
    try:
        with (directory / FILE).open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ()
    found = _FRONT_MATTER.match(text)
    words = set(re.findall(r"[a-z0-9_.-]+", found[1].lower())) if found else set()
    return tuple(sorted(words.intersection(recipes)))


def recipe_on_card(directory: Path, recipes: Collection[str]) -> str:
    """
    Return the only recipe that the model card names.

    Raises:
        ConfigError: `QP-CFG-OVERRIDE` when it names none, or several.
    """
    named = recipes_on_card(directory, recipes)
    if len(named) != 1:
        raise ConfigError(
            "QP-CFG-OVERRIDE",
            f"{directory / FILE}: metadata",
            f"names {', '.join(named)}" if named else "names no grid that an installed plugin knows",
            expected=f"exactly one of {', '.join(sorted(recipes))}",
            fix="Say which grid you want instead of leaving it to the card.",
        )
    return named[0]
