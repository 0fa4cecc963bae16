"""
The lists and mappings of a GPTQ configuration as ordered rules.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantplug.entries import only_rules, path_entries, rules_from_dynamic
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_mapping
from quantplug.skip import Entry, EntryKind, Rule
from quantplug_gptq.fields import read_storage
from quantplug_gptq.keys import check_meaning

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.skip import SchemeRef
    from quantplug_gptq.fields import Storage

_WHOLE_FILE = ("checkpoint_format", "format", "method", "quant_method", "is_marlin_format")
"""Keys that one module cannot change."""
_STORAGE = ("bits", "group_size", "sym", "desc_act")
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
_MODULES = "modules_in_block_to_quantize"
# Layers may have an `output` of their own, so only the model's counts.
_HEADS = (("lm_head", EntryKind.SUFFIX), ("embed_out", EntryKind.SUFFIX), ("output", EntryKind.EXACT))


def dynamic_rules(raw: RawConfig, base: Storage, use: SchemeRef) -> tuple[Rule, ...]:
    """
    Return the rules of `dynamic`: `-:expression` leaves a module whole, `+:expression` or a bare one overrides fields.

    Keys that say how a module was quantized (`mse`, `damp_percent`, …) are left out of account.

    Args:
        raw: the configuration.
        base: its fields.
        use: the scheme they make.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-SKIP-PATTERN`, `QP-CFG-UNKNOWN` for what a module cannot override.
    """
    where = raw.origin("dynamic")
    if raw.fields.get("dynamic") is None:
        return ()
    overrides = get_mapping(raw.fields, "dynamic", where)
    cleaned = {
        key: _override(raw, value, f"{where}[{number}]", base) for number, (key, value) in enumerate(overrides.items())
    }
    return rules_from_dynamic(cleaned, use, where)


def _override(raw: RawConfig, value: Json, place: str, base: Storage) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise ConfigError("QP-CFG-FIELD", place, f"is {describe_json(value)}", expected="an object")
    for name in _WHOLE_FILE:
        if name in value and value[name] != raw.fields.get(name):
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                f"{place}.{name}",
                f"is {describe_json(value[name])}, which one module cannot choose",
                expected=f"the {name} of the whole file",
            )
    check_meaning(value, lambda key: f"{place}.{key}")
    read_storage(value, lambda key: f"{place}.{key}", base)
    return {key: value[key] for key in _STORAGE if key in value}


def head_rules(use: SchemeRef | None, origin: str) -> tuple[Rule, ...]:
    """Return the rules that `lm_head` implies: the output head by its usual names, in one scheme or whole."""
    return tuple(Rule(Entry(name, kind, name, origin, implied=True), use) for name, kind in _HEADS)


def positive_rules(raw: RawConfig, use: SchemeRef) -> tuple[Rule, ...]:
    """
    Return the rules of the lists that name what *is* quantized: blocks, modules within blocks, or both.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-SKIP-PATTERN`.
    """
    blocks = [rule for key in _BLOCKS for rule in only_rules(_split(raw.fields.get(key)), use, raw.origin(key))]
    modules = only_rules(raw.fields.get(_MODULES), use, raw.origin(_MODULES))
    if not blocks or not modules:
        return (*blocks, *modules)
    inside = "|".join(re.escape(rule.entry.pattern) for rule in blocks)
    return tuple(
        Rule(
            Entry(
                rule.entry.text,
                EntryKind.REGEX,
                rf"(?:{inside})\.(?:.*\.)?{re.escape(rule.entry.pattern)}",
                rule.entry.origin,
                "fullmatch",
            ),
            use,
        )
        for rule in modules
    )


def skipped_rules(raw: RawConfig) -> tuple[Rule, ...]:
    """Return the rules of `modules_to_not_convert`, which some writers add."""
    key = "modules_to_not_convert"
    return tuple(Rule(entry) for entry in path_entries(raw.fields.get(key), raw.origin(key)))


def _split(value: Json) -> Json:
    """Return a comma-separated text as a list, anything else as it is."""
    if isinstance(value, str):
        return [text for text in value.split(",") if text.strip()]
    return value
