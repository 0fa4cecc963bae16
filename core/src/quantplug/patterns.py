r"""
Expressions and globs out of files that nobody trusts: vetted before they run, so that matching ends in bounded time.

Python's matcher backtracks and cannot be interrupted. So an expression is accepted only if the number of its steps on
the longest name is provably small (`backtracking.py`). First it is simplified where that changes no answer: in
`.*layers.*mlp.*gate` the leftmost `layers` is as good as any other, so the gap before it need not be tried again.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from quantplug.backtracking import worst_steps
from quantplug.errors import CheckpointError, ConfigError
from quantplug.regextree import UnboundedError, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.skip import RegexMode

MAX_PATTERN = 256
"""Characters of an expression or glob; the longest seen in a published checkpoint has 96."""
MAX_NAME = 512
"""Characters of a module name."""
MAX_STEPS = 10**8
"""Steps of one match on a name of `MAX_NAME` characters, as estimated: well under a second."""

# One token: an escape, a character set, a gap, a parenthesis or branch, or any other character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\.\*\??|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Vetted:
    """
    An expression that may run.

    Attributes:
        regex: compiled, perhaps in simplified form; it accepts the same names as the original.
        accepts: whether a name matches, in the mode that was asked for.
        steps: upper bound on its steps on a name of `MAX_NAME` characters.
        head: literal text that every accepted name begins with, "" when it is not known.

    """

    regex: re.Pattern[str]
    accepts: Callable[[str], re.Match[str] | None]
    steps: int
    head: str


def vet(pattern: str, origin: str, mode: RegexMode = "match") -> re.Pattern[str]:
    """
    Return the compiled expression, or refuse it.

    It is compiled so that `match` answers for the modes `match` and `search`, and `fullmatch` for `fullmatch`.

    Args:
        pattern: the expression, without a prefix such as `re:`.
        origin: where it stands, for messages.
        mode: how it will be applied.

    Raises:
        ConfigError: `QP-SKIP-PATTERN` when it is malformed (with the position), too long, or could run without bound.

    """
    return examine(pattern, origin, mode).regex


def examine(pattern: str, origin: str, mode: RegexMode = "match") -> Vetted:
    """As `vet`, with what was found out about the expression."""
    _check_length(pattern, origin)
    try:
        return _examine(pattern, mode)
    except re.error as error:
        place = "" if error.pos is None else f" at position {error.pos}"
        raise _refusal(origin, f"the pattern {pattern!r} is malformed{place}: {error.msg}", _SYNTAX) from error
    except (OverflowError, FutureWarning) as error:
        raise _refusal(origin, f"the pattern {pattern!r} is malformed: {error}", _SYNTAX) from error
    except UnboundedError as error:
        raise _refusal(origin, f"the pattern {pattern!r} {error}", _BOUNDED, fix=_REWRITE) from error


_END = r"\Z"
"""The length of what `fnmatch.translate` ends with; Python 3.14 spells it in lower case."""


def compile_glob(pattern: str, origin: str, *, below: bool = False) -> Vetted:
    """
    Return a shell-style glob over whole names, compiled; `*` crosses dots. Its time is linear in the name.

    Args:
        pattern: the glob.
        origin: where it stands.
        below: whether it may match up to a dot, so that names below one that matches do, too.

    Raises:
        ConfigError: `QP-SKIP-PATTERN` when it is too long.

    """
    _check_length(pattern, origin)
    head = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    # The standard library's translation never retries a `*` that has found its place.
    translated = fnmatch.translate(pattern)
    regex = re.compile(rf"{translated[: -len(_END)]}(?:\.|{translated[-len(_END) :]})" if below else translated)
    return Vetted(regex, regex.match, len(pattern) * MAX_NAME, head)


def check_name(name: str) -> None:
    """
    Refuse a module name beyond `MAX_NAME`, for which no pattern's time is known, or with control characters.

    Raises:
        CheckpointError: `QP-ST-NAME`.

    """
    if len(name) > MAX_NAME:
        raise CheckpointError(
            "QP-ST-NAME",
            f"{name[:60]}…",
            f"a module name of {len(name):,} characters",
            expected=f"at most {MAX_NAME}",
            fix=_STRANGE,
        )
    if not name.isprintable():
        raise CheckpointError(
            "QP-ST-NAME", repr(name), "a module name with control characters", expected="printable text", fix=_STRANGE
        )


_STRANGE = "No known model has names like this; check where the file comes from."
_SYNTAX = "a regular expression as Python's re module reads it"
_BOUNDED = f"an expression whose time is bounded on every name of up to {MAX_NAME} characters"
_REWRITE = "Write it without nested or overlapping repetitions, flags and references; layer names never need them."


@lru_cache(maxsize=8192)
def _examine(pattern: str, mode: RegexMode) -> Vetted:
    parse(pattern)  # refuses what it must in the words of the original
    simple = _simplified(pattern, anywhere=mode == "search")
    expression = parse(simple)
    steps = worst_steps(expression, MAX_NAME, whole=mode == "fullmatch")
    if steps > MAX_STEPS:
        raise UnboundedError(f"could take {steps:.1e} steps on one name")
    regex = re.compile(simple)
    return Vetted(regex, regex.fullmatch if mode == "fullmatch" else regex.match, steps, expression.head)


def _simplified(pattern: str, *, anywhere: bool) -> str:
    """
    Return an equal expression in which no gap is tried again once what follows it was found.

    Between two gaps (`.*`) stands a piece. If all its matches have the same length, its leftmost match ends first and
    leaves the most to the gap behind it, so no other match of it can succeed where that one fails. An expression that
    may match anywhere is one with a gap before it.
    """
    pieces = split_gaps(pattern)
    if pieces is None:
        return f".*(?:{pattern})" if anywhere else pattern
    if anywhere:
        pieces = ["", *pieces]
    middle = [f"(?>.*?{piece})" if parse(piece).fixed else f".*{piece}" for piece in pieces[1:-1] if piece]
    return ".*".join([pieces[0] + "".join(middle), *pieces[1:][-1:]])


def split_gaps(pattern: str) -> list[str] | None:
    """Split at the gaps outside of groups; None for an expression with top-level branches, or with comments."""
    pieces, depth = [""], 0
    for part in _TOKEN.findall(pattern):
        depth += (part == "(") - (part == ")")
        if depth == 0 and part in (".*", ".*?"):
            pieces.append("")
        elif depth == 0 and part == "|":
            return None
        else:
            pieces[-1] += part
    return None if "(?#" in pattern else pieces


def _check_length(pattern: str, origin: str) -> None:
    if not isinstance(pattern, str):
        raise _refusal(origin, f"a pattern is of type {type(pattern).__name__}", "text")
    if len(pattern) > MAX_PATTERN:
        raise _refusal(
            origin,
            f"a pattern of {len(pattern):,} characters ({pattern[:40]!r}…)",
            f"at most {MAX_PATTERN}",
            fix="Split it into several entries.",
        )


def _refusal(origin: str, what: str, expected: str, fix: str = "") -> ConfigError:
    return ConfigError("QP-SKIP-PATTERN", origin, what, expected=expected, fix=fix)
