"""
One description out of the places in which ModelOpt states the same facts.

`hf_quant_config.json` nests them in an object `quantization`; the newer `quantization_config` of config.json is flat
and calls some of them by other names (`exclude_modules` is `ignore` there, `kv_cache_quant_algo` is
`kv_cache_scheme`). Checkpoints have either or both. Where both state a fact, they must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError, list_names
from quantplug.jsonio import describe_json, get_int, get_list_of_str, get_mapping
from quantplug.sections import same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

NESTED = "quantization"

_ALGO = ("quant_algo",)
_EXCLUDED = ("exclude_modules", "ignore")
_KV = ("kv_cache_quant_algo", "kv_cache_scheme")
_SIZE = ("group_size",)
_LAYERS = ("quantized_layers",)
_GROUPS = ("config_groups",)
MEANING = ("has_zero_point", "pre_quant_scale", "lora_rank")
"""Keys that change what the tensors mean when they are set."""
KNOWN = frozenset({"quant_method", "producer", NESTED, *_ALGO, *_EXCLUDED, *_KV, *_SIZE, *_LAYERS, *_GROUPS, *MEANING})
"""Keys of either place that this reader acts on, or may leave out of account."""


@dataclass(frozen=True, slots=True)
class Stated:
    """One value and where it stands."""

    value: Json
    origin: str


@dataclass(frozen=True, slots=True)
class Description:
    """
    The facts of one checkpoint, each from the first place that states it.

    Attributes:
        algo: `quant_algo`.
        excluded: texts of the layers that were left whole.
        kv_cache: `FP8` and the like in upper case, or None when the cache is not quantized.
        group_size: inputs per scale, or None when it is not stated.
        layers: `quantized_layers`, or None.
        groups: `config_groups`, or None.
        meaning: keys of `MEANING` that are stated for all layers.
        notes: keys that nobody here has heard of.
    """

    algo: Stated
    excluded: Stated
    kv_cache: Stated
    group_size: int | None
    layers: Stated | None
    groups: Stated | None
    meaning: tuple[tuple[str, Stated], ...]
    notes: tuple[str, ...]


def read_description(raw: RawConfig) -> Description:
    """
    Bring the places together.

    Raises:
        ConfigError: `QP-CFG-FIELD` for a value of a wrong type, `QP-CFG-CONTRADICTION` with both values and places,
            `QP-CFG-UNKNOWN` for a cache of keys and values that is described by numbers nobody knows.
    """
    places = _Places(raw)
    algo = places.agreed(_ALGO, _upper) or Stated(None, raw.where)
    excluded = places.agreed(_EXCLUDED, _excluded) or Stated([], raw.where)
    kv_cache = places.agreed(_KV, _kv_cache) or Stated(None, raw.where)
    size = places.agreed(_SIZE, _group_size)
    return Description(
        algo=algo,
        excluded=excluded,
        kv_cache=kv_cache,
        group_size=size.value if size is not None and isinstance(size.value, int) else None,
        layers=places.agreed(_LAYERS, _object),
        groups=places.agreed(_GROUPS, _object),
        meaning=tuple(places.stated(MEANING)),
        notes=tuple(f"{origin} is not known to this reader and left out of account" for origin in places.unknown()),
    )


class _Places:
    """The flat section and the nested object, as one sequence of (fields, origin of a key)."""

    def __init__(self, raw: RawConfig) -> None:
        self._raw = raw
        self._nested = get_mapping(raw.fields, NESTED, raw.origin(NESTED), default={})

    def stated(self, keys: Sequence[str]) -> Iterator[tuple[str, Stated]]:
        """Yield every value of a fact, whatever it is called, with the place."""
        yield from (
            (key, Stated(self._raw.fields[key], self._raw.origin(key))) for key in keys if key in self._raw.fields
        )
        inside = self._raw.origin(NESTED)
        yield from ((key, Stated(self._nested[key], f"{inside}.{key}")) for key in keys if key in self._nested)

    def agreed(self, keys: Sequence[str], read: Callable[[str, Stated], Json]) -> Stated | None:
        """Return a fact from the first place that states it, after a look at the others; None when none does."""
        first: tuple[Stated, Stated] | None = None
        for key, found in self.stated(keys):
            if found.value is None:
                continue
            value = Stated(read(key, found), found.origin)
            if first is None:
                first = (value, found)
            elif not _equal(first[0].value, value.value):
                raise ConfigError(
                    "QP-CFG-CONTRADICTION",
                    found.origin,
                    f"is {describe_json(found.value)}, while {first[1].origin} is {describe_json(first[1].value)}"
                    + _apart(first[0].value, value.value),
                    expected="the same in both places",
                    fix="Find out which one describes the tensors, and correct the other.",
                )
        return first[0] if first else None

    def unknown(self) -> Iterator[str]:
        """Yield the origins of keys that nobody here has heard of."""
        yield from (self._raw.origin(key) for key in self._raw.fields if key not in KNOWN)
        yield from (f"{self._raw.origin(NESTED)}.{key}" for key in self._nested if key not in KNOWN)


def refuse_meaning(key: str, value: Json, origin: str) -> None:
    """
    Refuse a key of `MEANING` that is set.

    Raises:
        ConfigError: `QP-CFG-REFUSED`.
    """
    if not value:
        return
    raise ConfigError(
        "QP-CFG-REFUSED",
        origin,
        f"{key} is {describe_json(value)}, which changes what the tensors mean in a way that is not read",
        expected="none, or false",
        fix="Use a copy of the model in another format, or convert the dense model (quantplug convert).",
    )


def _upper(key: str, found: Stated) -> Json:
    if not isinstance(found.value, str):
        raise ConfigError(
            "QP-CFG-FIELD", found.origin, f"{key} is {describe_json(found.value)}", expected="a string such as 'FP8'"
        )
    return found.value.upper()


def _excluded(key: str, found: Stated) -> Json:
    return list(get_list_of_str({key: found.value}, key, found.origin))


def _object(key: str, found: Stated) -> Json:
    return get_mapping({key: found.value}, key, found.origin)


def _group_size(key: str, found: Stated) -> Json:
    return get_int({key: found.value}, key, found.origin, minimum=0) or None


def _kv_cache(key: str, found: Stated) -> Json:
    """Return the name of a cache's type, from its name or from the description that config.json has instead."""
    if not isinstance(found.value, dict):
        return _upper(key, found)
    kind, bits = found.value.get("type"), found.value.get("num_bits")
    if bits == 8 and kind in ("float", "int"):
        return "FP8" if kind == "float" else "INT8"
    raise ConfigError(
        "QP-CFG-UNKNOWN",
        found.origin,
        f"{key} has type {describe_json(kind)} and num_bits {describe_json(bits)}",
        expected="8 bits of type 'float' or 'int', or a name such as 'FP8'",
    )


def _apart(one: Json, two: Json) -> str:
    """Return what only one of two lists has, for a message."""
    if not (isinstance(one, list) and isinstance(two, list)):
        return ""
    return f" (in one of them only: {list_names({*map(str, one)} ^ {*map(str, two)})})"


def _equal(one: Json, two: Json) -> bool:
    """Whether two values say the same; the order of a list of names does not count."""
    if isinstance(one, list) and isinstance(two, list):
        return {*map(str, one)} == {*map(str, two)}
    return same(one, two)
