"""
AWQ's spelling of a configuration: `quantization_config` in config.json, AutoAWQ's quant_config.json, or both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import only_rules, path_entries, rules_from_dynamic
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_mapping, get_str
from quantplug.names import GENERIC
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef
from quantplug_awq.fields import GEMM, layout_of, read_bits, read_group_size
from quantplug_awq.keys import check_meaning, unknown_keys
from quantplug_awq.scheme import AWQScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

_BITS, _GROUP = ("bits", "w_bit"), ("group_size", "q_group_size")
_LAYOUT = ("version", "format", "checkpoint_format")
"""Names of one thing each: AutoAWQ's own file, config.json and GPTQModel differ. Where several stand, they agree."""
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
_SKIPPED = "modules_to_not_convert"
# Layers may have an `output` of their own, so only the model's counts.
_HEADS = tuple((name, EntryKind.EXACT if name == "output" else EntryKind.SUFFIX) for name in GENERIC.heads)


class AWQDialect(Dialect):
    """Reads AWQ configurations of AutoAWQ, auto-round and GPTQModel."""

    name = "awq"
    methods = ("awq", "auto_awq", "awq_marlin")
    """`auto_awq` and `awq_marlin` are what some engines call plain AWQ files that they repack themselves."""
    files = ("quant_config.json",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: `dynamic` first, then lists of what is left whole, the output head, blocks.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        layout = _layout(raw)
        check_meaning(raw.fields, raw.origin)
        params: dict[str, Json] = {
            "bits": _only(raw, _BITS, read_bits),
            "group_size": _only(raw, _GROUP, read_group_size),
            "version": layout,
            "zero_point": _has_zero_points(raw.fields, raw.origin),
        }
        use = SchemeRef(AWQScheme.name, tuple(sorted(params.items())))
        head = get_bool(raw.fields, "lm_head", raw.origin("lm_head"), default=False)
        skipped = path_entries(raw.fields.get(_SKIPPED), raw.origin(_SKIPPED))
        positive = [rule for key in _BLOCKS for rule in only_rules(_split(raw.fields.get(key)), use, raw.origin(key))]
        rules = [*_dynamic_rules(raw, use), *map(Rule, skipped)]
        if positive or not head:
            where = raw.origin("lm_head")
            rules += [
                Rule(Entry(name, kind, name, where, implied=True), use if head else None) for name, kind in _HEADS
            ]
        missing = {key: value for key, value in params.items() if not _spelled(raw, key)} | {"lm_head": head}
        return QuantConfig(
            self.name,
            None if positive else use,
            (*rules, *positive),
            (
                *(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
                *(Field(key, value, raw.origin(key)) for key, value in missing.items() if key not in raw.fields),
            ),
            tuple(unknown_keys(raw)),
        )


def _layout(raw: RawConfig) -> str:
    """Return the layout, which goes by three names, all of which must agree."""
    method = get_str(raw.fields, "method", raw.origin("method"), default="awq")
    if method != "awq":
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            raw.origin("method"),
            f"is {describe_json(method)}, while quant_method is {raw.method!r}",
            expected="'awq'",
        )
    if raw.fields.get("backend") == "llm-awq":
        layout_of("llm-awq", raw.origin("backend"))
    found = [
        (key, layout_of(get_str(raw.fields, key, raw.origin(key)), raw.origin(key)))
        for key in _LAYOUT
        if raw.fields.get(key) is not None
    ]
    if len({layout for _, layout in found}) > 1:
        raise _contradiction(raw, [key for key, _ in found])
    return found[0][1] if found else GEMM


def _only(raw: RawConfig, keys: tuple[str, ...], read: Callable[[Mapping[str, Json], str, str], int]) -> int:
    """Return a number that goes by several names."""
    present = [key for key in keys if key in raw.fields] or [keys[0]]
    values = {key: read(raw.fields, key, raw.origin(key)) for key in present}
    if len(set(values.values())) > 1:
        raise _contradiction(raw, present)
    return values[present[0]]


def _contradiction(raw: RawConfig, keys: list[str]) -> ConfigError:
    return ConfigError(
        "QP-CFG-CONTRADICTION",
        raw.origin(keys[-1]),
        f"is {describe_json(raw.fields[keys[-1]])}, while "
        + ", ".join(f"{raw.origin(key)} is {describe_json(raw.fields[key])}" for key in keys[:-1]),
        expected="the same in all of them",
    )


def _has_zero_points(fields: Mapping[str, Json], origin: Callable[[str], str]) -> bool:
    """Return `zero_point`, else the opposite of `sym`, else True, which reads symmetric files rightly, too."""
    if fields.get("zero_point") is not None:
        return get_bool(fields, "zero_point", origin("zero_point"))
    if fields.get("sym") is not None:
        return not get_bool(fields, "sym", origin("sym"))
    return True


def _dynamic_rules(raw: RawConfig, use: SchemeRef) -> tuple[Rule, ...]:
    """Return the rules of GPTQModel's `dynamic`: `-:expression` leaves whole, others change group size or symmetry."""
    where = raw.origin("dynamic")
    if raw.fields.get("dynamic") is None:
        return ()
    cleaned: dict[str, Json] = {}
    for number, (key, value) in enumerate(get_mapping(raw.fields, "dynamic", where).items()):
        place = f"{where}[{number}]"
        if not isinstance(value, dict):
            raise ConfigError("QP-CFG-FIELD", place, f"is {describe_json(value)}", expected="an object")
        cleaned[key] = _override(value, use, place)
    return rules_from_dynamic(cleaned, use, where)


def _override(given: Mapping[str, Json], use: SchemeRef, place: str) -> dict[str, Json]:
    def origin(key: str) -> str:
        return f"{place}.{key}"

    check_meaning(given, origin)
    base = dict(use.params)
    for key in _LAYOUT:
        if key in given and layout_of(get_str(given, key, origin(key)), origin(key)) != base["version"]:
            raise ConfigError(
                "QP-CFG-UNKNOWN", origin(key), f"is {describe_json(given[key])}, which one module cannot choose",
                expected=f"{base['version']!r}, as in the whole file",
            )  # fmt: skip
    if "bits" in given:
        read_bits(given, "bits", origin("bits"))
    changes: dict[str, Json] = {}
    if "group_size" in given:
        changes["group_size"] = read_group_size(given, "group_size", origin("group_size"))
    if given.get("zero_point") is not None or given.get("sym") is not None:
        changes["zero_point"] = _has_zero_points(given, origin)
    return changes


def _spelled(raw: RawConfig, param: str) -> bool:
    """Whether the files say a parameter of the scheme, under whatever name."""
    names = {"bits": _BITS, "group_size": _GROUP, "version": _LAYOUT, "zero_point": ("zero_point", "sym")}
    return any(raw.fields.get(key) is not None for key in names[param])


def _split(value: Json) -> Json:
    """Return a comma-separated text as a list, anything else as it is."""
    if isinstance(value, str):
        return [text for text in value.split(",") if text.strip()]
    return value
