"""
Strict JSON: the bytes of a file to plain values, or the fault with its place.

Stricter than `json.loads` where that is lenient in a way that lets one file mean two things: bytes that are not UTF-8,
lone surrogates, a key twice in one object, NaN and infinities, integers of any length, nesting of any depth.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NoReturn

if TYPE_CHECKING:
    from quantplug.jsonio import Json

MAX_DEPTH = 64
"""Objects and arrays within each other."""
MAX_DIGITS = 20
"""Digits of an integer: enough for any unsigned 64-bit number."""
MAX_FLOAT = 100
"""Characters of a number with a fraction or an exponent."""
MAX_VALUES = 8_000_000
"""Commas and opening brackets outside strings; bounds the memory that a small file can unfold to."""

JsonFault = Literal["encoding", "json", "duplicate", "number"]

_BOMS = (
    (b"\xef\xbb\xbf", "starts with a byte order mark"),
    (b"\xff\xfe", "is UTF-16"),
    (b"\xfe\xff", "is UTF-16"),
)
_STRUCTURAL = b'"[]{},:'
_NOT_STRUCTURAL = bytes(byte for byte in range(256) if byte not in _STRUCTURAL)
_STEP = tuple(1 if chr(byte) in "[{" else -1 if chr(byte) in "]}" else 0 for byte in range(256))
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_INTEGER = b"0" * (MAX_DIGITS + 1)
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonTextError(Exception):
    """
    JSON text is not acceptable.

    Attributes:
        kind: what sort of fault.
        what: what was found, with its place.
        expected: what must be there.
    """

    def __init__(self, kind: JsonFault, what: str, expected: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.expected = expected


def decode_json(data: bytes, *, max_values: int = MAX_VALUES) -> Json:
    """
    Return the value that strict JSON bytes spell. `-0` is the float -0.0, as other readers have it.

    Args:
        data: the whole text.
        max_values: commas and opening brackets allowed outside strings.

    Raises:
        JsonTextError: saying what is wrong and where.
    """
    text = _decode(data)
    keys = _check_structure(data, max_values)
    try:
        value = _parse(text, data, keys)
    except json.JSONDecodeError as error:
        cut = " (the text ends too early)" if error.pos >= len(text.rstrip()) else ""
        raise JsonTextError(
            "json", f"is not JSON at line {error.lineno} column {error.colno}: {error.msg}{cut}", "valid JSON"
        ) from None
    except RecursionError:
        # Only when the caller's own stack was almost used up: `_check_structure` has bounded the depth.
        raise JsonTextError("json", "is nested too deeply for the stack that is left") from None
    if b"\\ud" in data or b"\\uD" in data:
        _refuse_surrogates(value)
    return value


def _decode(data: bytes) -> str:
    for mark, what in _BOMS:
        if data.startswith(mark):
            raise JsonTextError("encoding", f"{what} (byte 0 is 0x{data[0]:02X})", "UTF-8 without a byte order mark")
    if b"\0" in data[:4]:
        raise JsonTextError(
            "encoding", f"has a NUL at byte {data.index(0)}, so it is UTF-16, UTF-32 or no text", "UTF-8 text"
        )
    if not data or data.isspace():
        raise JsonTextError("json", "is empty", "valid JSON")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonTextError(
            "encoding", f"is not UTF-8 at byte {error.start} (0x{data[error.start]:02X}): {error.reason}", "UTF-8 text"
        ) from None


def _check_structure(data: bytes, max_values: int) -> int:
    """
    Bound depth and number of values before a parser, whose stack and memory are not bounded, sees the text.

    Return the number of keys in it, those that come twice included.
    """
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = data.translate(None, _NOT_STRUCTURAL)
    if marks.count(b'"') > 4 * max_values:
        raise JsonTextError("json", f"holds more than {2 * max_values} strings")
    # Strings end where they began: every second piece lies outside.
    outside = b"".join(marks.split(b'"')[::2])
    values = outside.count(b",") + outside.count(b"[") + outside.count(b"{")
    if values > max_values:
        raise JsonTextError("json", f"holds {values} values and more", f"at most {max_values}")
    # A parser stops at the first bracket that does not fit, so it never gets deeper than this count.
    if max(accumulate(map(_STEP.__getitem__, outside)), default=0) > MAX_DEPTH:
        raise JsonTextError("json", f"is nested more than {MAX_DEPTH} deep", f"at most {MAX_DEPTH} levels")
    return outside.count(b":")


def _parse(text: str, data: bytes, keys: int) -> Json:
    # A function called for every object and every integer takes half the time of a large header; this is how to do
    # without where it could find nothing.
    if b"-0" not in data and _LONG_INTEGER not in data.translate(_DIGITS_TO_ZERO):
        value: Json = json.loads(text, parse_float=_float, parse_constant=_constant)
        if _count_keys(value) == keys:
            return value
    checked: Json = json.loads(
        text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
    )
    return checked


def _count_keys(value: Json) -> int:
    keys, containers = 0, [value]
    while containers:
        item = containers.pop()
        if isinstance(item, dict):
            keys += len(item)
            containers.extend(item.values())
        elif isinstance(item, list):
            containers.extend(item)
    return keys


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise JsonTextError("duplicate", f"has the key {twice!r:.200} twice in one object", "every key once")
    return fields


def _integer(text: str) -> int | float:
    if len(text.removeprefix("-")) > MAX_DIGITS:
        raise JsonTextError("number", f"has an integer of {len(text)} characters ({text[:12]}…)", "at most 64 bits")
    return -0.0 if text == "-0" else int(text)


def _float(text: str) -> float:
    number = float(text) if len(text) <= MAX_FLOAT else math.inf
    if math.isinf(number):
        raise JsonTextError("number", f"has the number {text[:40]}, which is too large or too long", "a finite number")
    return number


def _constant(text: str) -> NoReturn:
    raise JsonTextError("number", f"has the constant {text}, which is not JSON", "a finite number")


def _refuse_surrogates(value: Json) -> None:
    """Refuse escapes that spell half of a character: such text can be neither printed nor written."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str) and _SURROGATE.search(item):
            raise JsonTextError(
                "encoding", f"has half of a surrogate pair in the string {item[:60]!r}", "whole characters"
            )
        if isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
