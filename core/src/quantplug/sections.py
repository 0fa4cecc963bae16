"""
Where a checkpoint speaks of its quantization, and whether those places agree with each other and with the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError, list_names
from quantplug.jsonio import describe_json, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from quantplug.jsonio import Json

CONFIG_FILE = "config.json"
METHOD = "quant_method"
CALLER = "caller"

MAIN_SECTION = "quantization_config"
_SECTIONS = (MAIN_SECTION, "compression_config")
_TEXT_CONFIG = "text_config"
# How writers name a configuration file of their own, whoever they are.
_NEIGHBOURS = "*quant*config*.json"
# Keys that other loaders have followed to code or to another repository; here they are words.
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "_attn_implementation_internal"})
_CHOICE_KEYS = frozenset({"kernel", "backend"})


@dataclass(frozen=True, slots=True)
class Section:
    """
    One place that describes the quantization.

    Attributes:
        file: name of the file.
        path: dotted path of the object in it, "" for the whole file.
        fields: the object, in the order of the file.
        owners: names of the dialects whose own file this is; () for a section of config.json.
    """

    file: str
    path: str
    fields: Mapping[str, Json]
    owners: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """The section in words ("config.json: quantization_config")."""
        return f"{self.file}: {self.path}" if self.path else self.file

    def origin(self, key: str) -> str:
        """Where one of its keys stands ("config.json: quantization_config.bits")."""
        return f"{self.file}: {self.path}.{key}" if self.path else f"{self.file}: {key}"


@dataclass(slots=True)
class Merged:
    """
    The fields of several sections brought together.

    Attributes:
        fields: by key.
        origins: where each came from.
        notes: what a reader should know.
    """

    fields: dict[str, Json] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_object(path: Path) -> dict[str, Json]:
    """Return the object in a JSON file; raises `ConfigError` (`QP-CFG-…`)."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError("QP-CFG-FIELD", str(path), f"is {describe_json(value)}", expected="an object")
    return value


def find_sections(
    directory: Path, model: Mapping[str, Json], owners: Mapping[str, tuple[str, ...]]
) -> tuple[Section, ...]:
    """
    Return every description there is, the one that leads first.

    Args:
        directory: of the checkpoint.
        model: its config.json.
        owners: file name -> dialects that own it.

    Raises:
        ConfigError: `QP-CFG-…` when one cannot be read or is not an object.
    """
    found = [_section(model, "", key) for key in _SECTIONS]
    found += [
        Section(file, "", read_object(directory / file), owners[file])
        for file in sorted(owners)
        if (directory / file).exists() or (directory / file).is_symlink()
    ]
    text = model.get(_TEXT_CONFIG)
    if isinstance(text, dict):
        found.append(_section(text, f"{_TEXT_CONFIG}.", MAIN_SECTION))
    return tuple(section for section in found if section is not None and section.fields)


def _section(model: Mapping[str, Json], prefix: str, key: str) -> Section | None:
    value = model.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        where = f"{CONFIG_FILE}: {prefix}{key}"
        raise ConfigError("QP-CFG-FIELD", where, f"is {describe_json(value)}", expected="an object")
    return Section(CONFIG_FILE, prefix + key, value)


def unread_neighbours(directory: Path, owners: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names of files that look like a quantization's own and that no installed plugin reads."""
    return sorted(path.name for path in directory.glob(_NEIGHBOURS) if path.name not in owners)


def merge(sections: Sequence[Section], dialect: str) -> Merged:
    """
    Return the fields of the leading section, completed from the dialect's own file.

    Only `quantization_config` is completed, and only from a file that the same dialect owns; of all other sections
    the keys they share must agree, and the rest is noted.

    Raises:
        ConfigError: `QP-CFG-CONTRADICTION` with both values and places.
    """
    merged = Merged()
    known: dict[str, tuple[Json, Section]] = {}
    leading = sections[0]
    for section in sections:
        joins = section is leading or (leading.path == MAIN_SECTION and dialect in section.owners)
        unused = []
        for key, value in section.fields.items():
            other, where = known.setdefault(key, (value, section))
            if where is not section:
                _compare(key, other, where, value, section)
                if _order_matters(other, value):
                    merged.notes.append(
                        f"{section.origin(key)} lists its entries in another order; that of {where.place} counts"
                    )
            if key in merged.fields:
                continue
            if joins:
                merged.fields[key] = value
                merged.origins[key] = section.origin(key)
            else:
                unused.append(key)
        if unused:
            merged.notes.append(f"{section.place}: {list_names(unused)} not used, since {leading.place} leads")
    return merged


def _compare(key: str, one: Json, first: Section, two: Json, second: Section) -> None:
    # One writer's two files may differ in the case of a word.
    if not same(_folded(one), _folded(two)):
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            second.origin(key),
            f"is {_shown(two)}, while {first.origin(key)} is {_shown(one)}",
            expected="the same in both places",
            fix="Find out which one describes the tensors, and correct or remove the other.",
        )


def add_override(merged: Merged, override: Mapping[str, Json]) -> None:
    """
    Add the caller's fields: what the file lacks is added, what it says can only be confirmed.

    Raises:
        ConfigError: `QP-CFG-OVERRIDE` when a field differs from the file's, or is no JSON value.
    """
    for key, value in override.items():
        if not _is_json(value):
            raise ConfigError("QP-CFG-OVERRIDE", CALLER, f"{key} is {value!r:.60}", expected="a plain JSON value")
        if key not in merged.fields:
            merged.fields[key] = value
            merged.origins[key] = CALLER
        elif same(merged.fields[key], value) or (key == METHOD and _folded(merged.fields[key]) == _folded(value)):
            merged.notes.append(f"{merged.origins[key]} is confirmed by the caller")
        else:
            raise ConfigError(
                "QP-CFG-OVERRIDE",
                CALLER,
                f"{key} is {_shown(value)}, while {merged.origins[key]} is {_shown(merged.fields[key])}",
                expected="the value of the file, which describes tensors that are already written",
                fix=f"Drop {key} from the override; to get other numbers, convert the original checkpoint.",
            )


def _folded(value: Json) -> Json:
    """Return a text in lower case, anything else as it is."""
    return value.lower() if isinstance(value, str) else value


def code_notes(model: Mapping[str, Json], merged: Merged) -> list[str]:
    """Drop keys that name code from the merged fields, and say which words of the checkpoint lead nowhere here."""
    notes = []
    named = {f"{CONFIG_FILE}: {path}" for path in _truthy(model, _CODE_KEYS)}
    named |= {merged.origins[key] for key in merged.fields.keys() & _CODE_KEYS if merged.fields[key]}
    if named:
        notes.append(f"ignored, since nothing in a checkpoint names code here: {list_names(named)}")
    for key in _CODE_KEYS:
        merged.fields.pop(key, None)
    notes += [
        f"{merged.origins[key]} is {_shown(merged.fields[key])}: chooses no kernel here, the plan does"
        for key in sorted(merged.fields.keys() & _CHOICE_KEYS)
    ]
    return notes


def _truthy(value: Mapping[str, Json], keys: frozenset[str], prefix: str = "") -> Iterator[str]:
    for key, item in value.items():
        if key in keys and item:
            yield prefix + key
        elif isinstance(item, dict):
            yield from _truthy(item, keys, f"{prefix}{key}.")


def same(one: Json, two: Json) -> bool:
    """Whether two JSON values are equal; true is not 1, and the order of an object's keys does not count."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    return isinstance(one, bool) == isinstance(two, bool) and one == two


def _order_matters(one: Json, two: Json) -> bool:
    """Whether two equal values are ordered rules (an object of objects) in a different order."""
    return (
        isinstance(one, dict)
        and isinstance(two, dict)
        and list(one) != list(two)
        and all(isinstance(value, dict) for value in one.values())
    )


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _shown(value: Json) -> str:
    return describe_json(value) if isinstance(value, (dict, list)) else repr(value)
