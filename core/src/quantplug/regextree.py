"""
The parse tree of a regular expression, as the few kinds of node that its cost depends on.

The parser is the one in the standard library, so that an expression means here what it means to `re`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    # The type stubs know these modules by their old names only.
    import sre_constants as ops
    import sre_parse as parser
    from collections.abc import Callable, Iterable
else:
    from re import _constants as ops
    from re import _parser as parser

END = 1 << 129
"""The end of the text, as if it were a character; bits 0 to 127 are ASCII, bit 128 is every other character."""
_OTHER = 1 << 128
_ASCII = _OTHER - 1
_EVERY = _ASCII | _OTHER
ANYTHING = _EVERY | END
_NEWLINE = 1 << 10
LINE = _EVERY & ~_NEWLINE
"""What `.` stands for."""


class UnboundedError(ValueError):
    """An expression uses what cannot be bounded; the message says what, in words that follow "the pattern"."""


@dataclass(frozen=True, slots=True)
class Text:
    """A run of literal characters; `period` is the least distance between two of its occurrences."""

    mask: int
    length: int
    period: int


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    mask: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place rather than a character; `mask` says what may come next there, None that it does not say."""

    mask: int | None


@dataclass(frozen=True, slots=True)
class Look:
    """A look ahead or behind: matches in one way or not at all."""

    body: Sequence


@dataclass(frozen=True, slots=True)
class Cut:
    """An atomic group: what it first matches stays, no other way is tried."""

    body: Sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several sequences."""

    branches: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One character out of a set, repeated; `most` is None when unlimited."""

    least: int
    most: int | None
    mask: int


@dataclass(frozen=True, slots=True)
class Repeat:
    """A repeated group; `width` is the least number of characters that one iteration takes."""

    least: int
    most: int | None
    body: Sequence
    width: int


Node: TypeAlias = "Text | Chars | Anchor | Look | Cut | Choice | Run | Repeat"
Sequence: TypeAlias = "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Expression:
    """
    A parsed expression.

    Attributes:
        nodes: what it consists of.
        head: literal text that every match at the start of a name begins with, "" when there is none.
        fixed: whether every match has the same number of characters.

    """

    nodes: Sequence
    head: str
    fixed: bool


def parse(pattern: str) -> Expression:
    """
    Parse an expression.

    Raises:
        re.error: for malformed syntax, with the position.
        OverflowError: for a repetition count beyond the parser's limit.
        FutureWarning: raised, for a set that a later Python may read otherwise.
        UnboundedError: for constructs without a bound, or that nobody needs in a list of module names.

    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        tree = parser.parse(pattern)
    if tree.state.flags & ~ops.SRE_FLAG_UNICODE:
        raise UnboundedError("sets flags")
    least, most = tree.getwidth()
    return Expression(_convert(tree), _head(tree), int(least) == int(most))


def union(masks: Iterable[int]) -> int:
    """Return the characters that are in any of the sets."""
    return reduce(int.__or__, masks, 0)


def _head(tree: parser.SubPattern) -> str:
    text = []
    for op, argument in tree.data:
        if op is ops.LITERAL:
            text.append(chr(_any(argument)))
        elif op is not ops.AT:
            break
    return "".join(text)


def _convert(tree: parser.SubPattern) -> Sequence:
    """Turn a parse tree into nodes; groups that are not repeated dissolve into the sequence around them."""
    nodes: list[Node] = []
    text: list[int] = []

    def flush() -> None:
        if text:
            nodes.append(Text(_bit(text[0]), len(text), _period(text)))
            text.clear()

    def walk(items: parser.SubPattern) -> None:
        for op, argument in items.data:
            if op is ops.SUBPATTERN:
                _, added, removed, body = _any(argument)
                if added or removed:
                    raise UnboundedError("sets flags")
                walk(body)
            elif op is ops.LITERAL:
                text.append(_any(argument))
            else:
                flush()
                nodes.append(_convert_node(op, argument))

    walk(tree)
    flush()
    return tuple(nodes)


def _convert_node(op: object, argument: Any) -> Node:
    if op is ops.ANY:
        return Chars(LINE)
    if op is ops.NOT_LITERAL:
        return Chars(_EVERY & ~(_bit(argument) & _ASCII))
    if op is ops.IN:
        return Chars(_set_mask(argument))
    if op is ops.BRANCH:
        return Choice(tuple(_convert(branch) for branch in argument[1]))
    if op is ops.MAX_REPEAT or op is ops.MIN_REPEAT:
        return _convert_repeat(*argument)
    if op is ops.ASSERT or op is ops.ASSERT_NOT:
        return Look(_convert(argument[1]))
    if op is ops.ATOMIC_GROUP:
        return Cut(_convert(argument))
    if op is ops.AT:
        return Anchor({ops.AT_END: END | _NEWLINE, ops.AT_END_STRING: END}.get(argument))
    if str(op) == "FAILURE":  # `(?!)`, an operation of its own since Python 3.13
        return Anchor(0)
    if op is ops.GROUPREF:
        raise UnboundedError("refers back to a group")
    if op is ops.GROUPREF_EXISTS:
        raise UnboundedError("depends on whether a group matched")
    raise UnboundedError(f"uses {str(op).lower().replace('_', ' ')}")


def _convert_repeat(least: int, most: Any, repeated: parser.SubPattern) -> Node:
    limit = None if most is ops.MAXREPEAT else int(most)
    body = _convert(repeated)
    if len(body) == 1 and (isinstance(body[0], Chars) or (isinstance(body[0], Text) and body[0].length == 1)):
        return Run(int(least), limit, body[0].mask)
    return Repeat(int(least), limit, body, int(repeated.getwidth()[0]))


def _period(text: list[int]) -> int:
    return next(shift for shift in range(1, len(text) + 1) if text[shift:] == text[: len(text) - shift])


def _bit(code: int) -> int:
    return 1 << code if code < 128 else _OTHER


def _ascii_where(test: Callable[[str], bool]) -> int:
    return union(1 << code for code in range(128) if test(chr(code)))


_CATEGORIES = {
    "CATEGORY_DIGIT": _ascii_where(str.isdigit),
    "CATEGORY_SPACE": _ascii_where(str.isspace),
    "CATEGORY_WORD": _ascii_where(lambda char: char.isalnum() or char == "_"),
}


def _set_mask(items: Any) -> int:
    """Return the characters of a `[…]`, or more: sets of other than ASCII characters are not told apart."""
    mask, negated = 0, False
    for op, argument in items:
        if op is ops.NEGATE:
            negated = True
        elif op is ops.LITERAL:
            mask |= _bit(argument)
        elif op is ops.RANGE:
            low, high = argument
            mask |= union(1 << code for code in range(low, min(high, 127) + 1)) | (_OTHER if high > 127 else 0)
        else:
            name = str(argument).replace("NOT_", "").replace("UNI_", "")
            found = _CATEGORIES[name]
            mask |= (_ASCII & ~found if "NOT_" in str(argument) else found) | _OTHER
    return (_ASCII & ~mask) | _OTHER if negated else mask


def _any(argument: Any) -> Any:
    """The parser's arguments have a type for each operation, which its stubs cannot say."""
    return argument
