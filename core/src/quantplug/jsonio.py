"""
JSON from files nobody trusts: size-capped, UTF-8 only, no duplicate keys, no NaN, no deep nesting.

`read_json` and `parse_json` give plain values; the `get_…` functions take typed fields out of an object, for dialects
and schemes. Types are never bent: true is not 1, 3.0 is not 3, "4" is not 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from quantplug.errors import ConfigError
from quantplug.files import FileAccessError, read_regular
from quantplug.jsontext import MAX_VALUES, JsonTextError, decode_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_BYTES = 16 * 1024 * 1024
"""Largest configuration file that is read."""
MAX_CONFIG_VALUES = 1_000_000
"""Most values in a configuration file."""

T = TypeVar("T")

_JSON_CODES = {
    "encoding": "QP-CFG-ENCODING",
    "json": "QP-CFG-JSON",
    "duplicate": "QP-CFG-DUPLICATE",
    "number": "QP-CFG-NUMBER",
}
_LONGEST_SHOWN = 60


def read_json(path: str | Path, *, where: str | None = None, limit: int = MAX_BYTES) -> Json:
    """
    Return the value in a JSON file. Never waits on a pipe or a device.

    Args:
        path: the file; a symbolic link is followed.
        where: how messages call it; None is the path.
        limit: largest size in bytes.

    Raises:
        ConfigError: `QP-CFG-FILE`, or as `parse_json`.
    """
    place = str(path) if where is None else where
    try:
        data = read_regular(Path(path), limit)
    except FileAccessError as fault:
        raise ConfigError(
            "QP-CFG-FILE",
            place,
            fault.what,
            expected=f"a regular JSON file of at most {limit // 1024} KiB",
            fix=fault.fix or "Check the path, and that the checkpoint was downloaded whole.",
        ) from fault
    return parse_json(data, place, max_values=MAX_CONFIG_VALUES)


def parse_json(data: bytes, where: str, *, max_values: int = MAX_VALUES) -> Json:
    """
    Return the value that JSON bytes spell.

    Args:
        data: the whole text, UTF-8.
        where: how messages call it.
        max_values: commas and opening brackets allowed outside strings.

    Raises:
        ConfigError: `QP-CFG-ENCODING`, `QP-CFG-JSON`, `QP-CFG-DUPLICATE` or `QP-CFG-NUMBER`, with line or byte.
    """
    try:
        return decode_json(data, max_values=max_values)
    except JsonTextError as fault:
        raise ConfigError(
            _JSON_CODES[fault.kind],
            where,
            fault.what,
            expected=fault.expected,
            fix="Correct the file, or download it again.",
        ) from fault


def describe_json(value: Json) -> str:
    """Return a value as messages show it: its type in JSON's words and its text, cut to a line."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return f"the integer {value}"
        case float():
            return f"the number {value!r}"
        case str():
            shown = value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "…"
            return f"the string {shown!r}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {len(value)} keys"


def get_int(
    fields: Mapping[str, Json],
    key: str,
    origin: str,
    *,
    default: int | None = None,
    minimum: int | None = None,
    maximum: int | None = None,
    choices: Sequence[int] | None = None,
) -> int:
    """
    Return an integer field.

    Args:
        fields: the object that holds it.
        key: its name.
        origin: where it, or the object, stands, for messages ("config.json: quantization_config.bits").
        default: its value when the key is absent; None makes it mandatory. An explicit null is never the default.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        choices: all values allowed.

    Raises:
        ConfigError: `QP-CFG-FIELD` when it is missing, of another type or out of range.
    """
    wanted = ["an integer"]
    if choices is not None:
        wanted.append(f"one of {', '.join(map(str, choices))}")
    if minimum is not None:
        wanted.append(f"at least {minimum}")
    if maximum is not None:
        wanted.append(f"at most {maximum}")
    expected = ", ".join(wanted)
    value = _value(fields, key, origin, default, expected)
    if (
        type(value) is not int
        or (choices is not None and value not in choices)
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
    ):
        raise _wrong(key, origin, value, expected)
    return value


def get_bool(fields: Mapping[str, Json], key: str, origin: str, *, default: bool | None = None) -> bool:
    """Return a field that is true or false; "false" and 0 are neither. Otherwise as `get_int`."""
    value = _value(fields, key, origin, default, "true or false")
    if not isinstance(value, bool):
        raise _wrong(key, origin, value, "true or false")
    return value


def get_str(
    fields: Mapping[str, Json],
    key: str,
    origin: str,
    *,
    default: str | None = None,
    choices: Sequence[str] | None = None,
) -> str:
    """Return a string field, one of `choices` unless that is None. Otherwise as `get_int`."""
    expected = "a string" if choices is None else f"one of {', '.join(map(repr, choices))}"
    value = _value(fields, key, origin, default, expected)
    if not isinstance(value, str) or (choices is not None and value not in choices):
        raise _wrong(key, origin, value, expected)
    return value


def get_list_of_str(
    fields: Mapping[str, Json], key: str, origin: str, *, default: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return a field that is a list of strings. Otherwise as `get_int`."""
    value = _value(fields, key, origin, None if default is None else list(default), "a list of strings")
    if not isinstance(value, list):
        raise _wrong(key, origin, value, "a list of strings")
    texts = []
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise _wrong(f"{key}[{position}]", origin, item, "a string")
        texts.append(item)
    return tuple(texts)


def get_mapping(
    fields: Mapping[str, Json], key: str, origin: str, *, default: Mapping[str, Json] | None = None
) -> dict[str, Json]:
    """Return a field that is an object, in the order of the file. Otherwise as `get_int`."""
    value = _value(fields, key, origin, None if default is None else dict(default), "an object")
    if not isinstance(value, dict):
        raise _wrong(key, origin, value, "an object")
    return value


def _value(fields: Mapping[str, Json], key: str, origin: str, default: Json, expected: str) -> Json:
    if key in fields:
        return fields[key]
    if default is None:
        raise ConfigError("QP-CFG-FIELD", origin, f"{key} is missing", expected=expected)
    return default


def _wrong(key: str, origin: str, value: Json, expected: str) -> ConfigError:
    return ConfigError(
        "QP-CFG-FIELD",
        origin,
        f"{key} is {describe_json(value)}",
        expected=expected,
        fix="Correct the file; types are taken as they are written.",
    )
