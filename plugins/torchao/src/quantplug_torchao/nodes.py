"""
The objects of a torchao configuration in JSON: `{"_type": class, "_version": number, "_data": fields}`.

Enumerations and dtypes have a name for `_data`. Whatever a name says, it is compared with known ones and never looked
up. Source: `torchao/core/config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_int, get_mapping, get_str

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from quantplug.jsonio import Json

_FIRST = 1
"""The version of an object that does not say its own."""


@dataclass(frozen=True, slots=True)
class Node:
    """One object: its class, its version, its fields or its name, and where it stands."""

    kind: str
    version: int
    data: Json
    where: str

    @property
    def fields(self) -> Mapping[str, Json]:
        """Return the fields; raises `ConfigError` (`QP-CFG-FIELD`) for an object that has a name instead."""
        return get_mapping({"_data": self.data}, "_data", self.where)

    def check_known(self, known: Collection[str]) -> None:
        """Refuse fields that are not known and not null (`QP-CFG-UNKNOWN`)."""
        check_known(self.fields, known, self.where)

    def at(self, key: str) -> str:
        """Return where a field stands."""
        return f"{self.where}.{key}"

    def word(self, key: str, kind: str, default: str, choices: Sequence[str] | None = None) -> str:
        """
        Return the name of a dtype or of a member of an enumeration.

        Args:
            key: the field.
            kind: class of the object that it must be.
            default: the name when the field is absent.
            choices: all names allowed; None allows any.

        Raises:
            ConfigError: `QP-CFG-FIELD`.
        """
        if key not in self.fields:
            return default
        named = read_node(self.fields[key], self.at(key))
        if named.kind != kind:
            raise ConfigError("QP-CFG-FIELD", f"{named.where}._type", f"is {named.kind!r}", expected=repr(kind))
        return get_str({"_data": named.data}, "_data", named.where, choices=choices)


def read_node(value: Json, where: str) -> Node:
    """
    Read the outermost layer of an object.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
    """
    if not isinstance(value, dict) or "_data" not in value:
        what = "_data is missing" if isinstance(value, dict) else f"is {describe_json(value)}"
        raise ConfigError("QP-CFG-FIELD", where, what, expected="an object with _type and _data")
    check_known(value, ("_type", "_version", "_data"), where)
    version = get_int(value, "_version", where, default=_FIRST)
    return Node(get_str(value, "_type", where), version, value["_data"], where)


def check_known(fields: Mapping[str, Json], known: Collection[str], where: str) -> None:
    """Refuse fields that are not known and not null (`QP-CFG-UNKNOWN`)."""
    for key in sorted(fields.keys() - set(known)):
        if fields[key] is not None:
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                f"{where}.{key}",
                f"is {describe_json(fields[key])}, which may change what the numbers mean",
                expected="a field that this reader knows",
                fix="A newer quantplug may know it; otherwise ask the maker of the checkpoint what it means.",
            )


def refused(where: str, what: str, expected: str) -> ConfigError:
    """Return the error about what is recognised and not read."""
    return ConfigError(
        "QP-CFG-REFUSED",
        where,
        what,
        expected=expected,
        fix="Use a copy of the model in another form, or convert the dense model (quantplug convert).",
    )
