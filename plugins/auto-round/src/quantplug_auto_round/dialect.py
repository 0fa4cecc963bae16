"""
auto-round's spelling of a configuration, whatever layout it chose for the tensors.

Schemes are named, never imported: any installed plugin that provides one of that name decodes the tensors.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import exact_or_regex_entries, only_rules, path_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_mapping
from quantplug.names import GENERIC
from quantplug.skip import Entry, EntryKind, Rule
from quantplug_auto_round.forms import DEFAULT_PACKING, scheme_of
from quantplug_auto_round.keys import BLOCKS, KNOWN, check_meaning

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

_SKIPPED = "modules_to_not_convert"


class AutoRoundDialect(Dialect):
    """Reads auto-round configurations."""

    name = "auto-round"
    methods = ("auto-round", "auto_round", "intel/auto-round")
    files = ("quantization_config.json",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: `extra_config` first (names before expressions), then blocks that are quantized.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        check_meaning(raw.fields, raw.origin)
        _check_blocks(raw)
        use = scheme_of(raw.fields, raw.origin)
        rules = [
            *_extra_rules(raw),
            *(Rule(entry) for entry in path_entries(raw.fields.get(_SKIPPED), raw.origin(_SKIPPED))),
        ]
        positive = [
            rule
            for key in BLOCKS
            if use is not None
            for rule in only_rules(_split(raw.fields.get(key)), use, raw.origin(key))
        ]
        if not positive:
            head = GENERIC.heads[0]
            rules.append(Rule(Entry(head, EntryKind.SUFFIX, head, raw.where, implied=True)))
        effective: dict[str, Json] = {"sym": True, "packing_format": DEFAULT_PACKING, "data_type": "int"}
        missing = [Field(key, value, raw.origin(key)) for key, value in effective.items() if key not in raw.fields]
        return QuantConfig(
            self.name,
            None if positive else use,
            (*rules, *positive),
            (*(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()), *missing),
            tuple(
                f"{raw.origin(key)} is not known to this reader and left out of account"
                for key in raw.fields
                if key not in KNOWN
            ),
        )


def _check_blocks(raw: RawConfig) -> None:
    """Check that the two names of a block size agree."""
    blocks, size = raw.fields.get("weight_block_size"), raw.fields.get("group_size")
    if blocks is not None and blocks != size:
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            raw.origin("weight_block_size"),
            f"is {blocks if isinstance(blocks, list) else describe_json(blocks)}, while {raw.origin('group_size')} is "
            f"{size if isinstance(size, list) else describe_json(size)}",
            expected="the same in both",
        )


def _extra_rules(raw: RawConfig) -> list[Rule]:
    """Return the rules of `extra_config`: single layers by name, then expressions that are searched for in names."""
    origin = raw.origin("extra_config")
    if raw.fields.get("extra_config") is None:
        return []
    layers = get_mapping(raw.fields, "extra_config", origin)
    rules = []
    for entry in exact_or_regex_entries(list(layers), origin, "search"):
        place = f"{origin}[{entry.text!r}]"
        given = {key: value for key, value in get_mapping(layers, entry.text, place).items() if value is not None}
        if given:
            stands = partial(_stands, raw, given, place)
            check_meaning(given, stands)
            rules.append(Rule(entry, scheme_of({**raw.fields, **given}, stands)))
    return rules


def _stands(raw: RawConfig, given: Mapping[str, Json], place: str, key: str) -> str:
    """Return where a key stands that a layer may change."""
    return f"{place}.{key}" if key in given else raw.origin(key)


def _split(value: Json) -> Json:
    """Return a comma-separated text as a list, anything else as it is."""
    if isinstance(value, str):
        return [text for text in value.split(",") if text.strip()]
    return value
