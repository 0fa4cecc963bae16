"""
The lists of a quantization section, taken as other engines take them: leniently, and None where they would stumble.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.jsonio import Json

NESTED = "quantization"
WHOLE_BITS = 16


def texts(section: Mapping[str, Json], *keys: str) -> Sequence[str] | None:
    """Return the list under the first of several keys that is there; [] for null, None for anything but texts."""
    value = next((section[key] for key in keys if key in section), None)
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [str(item) for item in value]
    return None


def stated(section: Mapping[str, Json], *keys: str) -> bool:
    """Return whether one of the keys has a value other than null."""
    return any(section.get(key) is not None for key in keys)


def flattened(value: Json) -> Sequence[str] | None:
    """Return the texts of a list of lists; None when there is anything else in it."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return None
    found: list[str] = []
    for item in value:
        inner = flattened(item)
        if inner is None:
            return None
        found += inner
    return found


def objects(section: Mapping[str, Json], key: str) -> Mapping[str, Json] | None:
    """Return the object under a key, empty when it is absent or null; None for anything else."""
    value = section.get(key)
    if value is None:
        return {}
    return value if isinstance(value, Mapping) else None


def modelopt_list(section: Mapping[str, Json]) -> Sequence[str] | None:
    """Return ModelOpt's list of excluded layers, wherever it stands; None for a mixed file."""
    nested = section.get(NESTED)
    place = nested if isinstance(nested, Mapping) else section
    if str(place.get("quant_algo", "")).upper() == "MIXED_PRECISION":
        return None
    return texts(place, "exclude_modules", "ignore")


def targets(section: Mapping[str, Json]) -> Sequence[str] | None:
    """Return the targets of all groups of a compressed-tensors section."""
    groups = objects(section, "config_groups")
    if not groups:
        return None
    found: list[str] = []
    for group in groups.values():
        listed = texts(group, "targets") if isinstance(group, Mapping) else None
        if listed is None:
            return None
        found += listed
    return found


def stays_whole(fields: Json) -> bool:
    """Return whether one layer's description in a mapping (auto-round) means that it is not quantized."""
    bits = fields.get("bits") if isinstance(fields, Mapping) else None
    return isinstance(bits, int) and not isinstance(bits, bool) and bits >= WHOLE_BITS
