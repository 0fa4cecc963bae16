"""
compressed-tensors' spelling of a configuration: `quantization_config` or `compression_config` in config.json.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import suffix_entries
from quantplug.jsonio import get_mapping
from quantplug.skip import Rule
from quantplug_compressed_tensors.args import activation_of, read_args
from quantplug_compressed_tensors.groups import read_groups
from quantplug_compressed_tensors.keys import check_meaning, unknown_keys
from quantplug_compressed_tensors.targets import default_of, ordered_rules
from quantplug_compressed_tensors.writing import DESCRIBED, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.skip import SchemeRef
    from quantplug.spec import ActivationSpec

_NESTED = "quantization_config"


class CompressedTensorsDialect(Dialect):
    """Reads and writes compressed-tensors configurations."""

    name = "compressed-tensors"
    methods = ("compressed-tensors", "compressed_tensors")
    writes = frozenset(DESCRIBED)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn groups into rules: `ignore` first, then targets by name, expression and class.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        raw = _flat(raw)
        check_meaning(raw)
        groups = read_groups(raw)
        targets = ordered_rules((entry, group.use) for group in groups for entry in group.targets)
        ignored = suffix_entries(raw.fields.get("ignore"), raw.origin("ignore"))
        notes = [note for group in groups for note in group.notes]
        return QuantConfig(
            self.name,
            default_of(targets),
            (*(Rule(entry) for entry in ignored), *targets),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
            (*sorted(notes), *unknown_keys(raw)),
            kv_cache=_cache(raw),
        )

    def write(self, base: SchemeRef, layers: Mapping[str, SchemeRef], dense: Collection[str]) -> dict[str, Json]:
        """
        Describe a converted checkpoint: one group for the base scheme with the target "Linear", one for every other.

        Raises:
            ConfigError: `QP-CFG-FIELD` for parameters that this spelling has no words for.
        """
        return describe(base, layers, dense)


def _flat(raw: RawConfig) -> RawConfig:
    """Return the section with what old writers nested in a `quantization_config` of its own brought up."""
    if raw.fields.get(_NESTED) is None:
        return raw
    where = raw.origin(_NESTED)
    inner = get_mapping(raw.fields, _NESTED, where)
    outer = {key: value for key, value in raw.fields.items() if key != _NESTED}
    origins = {**raw.origins, **{key: f"{where}.{key}" for key in inner}}
    return replace(raw, fields={**outer, **inner}, origins=origins)


def _cache(raw: RawConfig) -> ActivationSpec | None:
    if raw.fields.get("kv_cache_scheme") is None:
        return None
    where = raw.origin("kv_cache_scheme")
    return activation_of(read_args(get_mapping(raw.fields, "kv_cache_scheme", where), where), where)
