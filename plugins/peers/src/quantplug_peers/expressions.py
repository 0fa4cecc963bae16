"""
Expressions out of files that nobody trusts, applied as another engine applies them, but only if that surely ends.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.patterns import MAX_PATTERN, vet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.skip import RegexMode


class UnsureError(Exception):
    """An expression may not run here, so that nobody knows what the engine makes of it."""


class MalformedError(Exception):
    """An expression that Python refuses, and so does the engine."""


def expression(pattern: str, mode: RegexMode) -> Callable[[str], bool]:
    """
    Return whether an expression matches a name, in the engine's mode.

    Raises:
        MalformedError: when Python does not compile it.
        UnsureError: when its time is not bounded, or it is too long to tell.
    """
    check(pattern, mode)
    regex = re.compile(pattern)
    apply = {"match": regex.match, "fullmatch": regex.fullmatch, "search": regex.search}[mode]
    return lambda name: apply(name) is not None


def check(pattern: str, mode: RegexMode, *, inside: str = "") -> None:
    """
    Raise what `expression` raises.

    Args:
        pattern: the expression.
        mode: how it is applied.
        inside: the expression that the engine really compiles, where it puts this one into another.
    """
    if len(pattern) > MAX_PATTERN:
        raise UnsureError(pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # what Python may read otherwise one day
            re.compile(inside or pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise MalformedError(pattern) from error
    except FutureWarning as error:
        raise UnsureError(pattern) from error
    try:
        vet(pattern, "", mode)
    except ConfigError as error:
        raise UnsureError(pattern) from error


def any_expression(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """Return one expression for several that `check` let through, None for none; raises `UnsureError`."""
    if not patterns:
        return None
    try:
        return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    except (re.error, OverflowError, RecursionError) as error:  # groups of one name, each fine on its own
        raise UnsureError(patterns[0]) from error
