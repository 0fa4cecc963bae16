"""
The groups of a configuration: what each one's targets are, and the scheme they get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.entries import suffix_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_mapping
from quantplug_compressed_tensors.args import read_args
from quantplug_compressed_tensors.formats import MIXED, check_format, infer_format, scheme_ref

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.skip import Entry, SchemeRef
    from quantplug_compressed_tensors.args import Args

_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_UNCOMPRESSED = ("dense", "fakequant")


@dataclass(frozen=True, slots=True)
class Group:
    """
    One group.

    Attributes:
        targets: its layers.
        use: the scheme they get, None where their weights stay whole.
        notes: what a reader should know.
    """

    targets: tuple[Entry, ...]
    use: SchemeRef | None
    notes: tuple[str, ...] = ()


def read_groups(raw: RawConfig) -> list[Group]:
    """
    Read `config_groups`.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
    """
    where = raw.origin("config_groups")
    found = get_mapping(raw.fields, "config_groups", where, default={})
    if not found and raw.fields.get("kv_cache_scheme") is None:
        raise ConfigError(
            "QP-CFG-FIELD", where, "config_groups names no group, and there is no kv_cache_scheme",
            expected="at least one group, or a checkpoint whose configuration names no quantization",
        )  # fmt: skip
    return [_group(raw, value, f"{where}.{name}") for name, value in found.items()]


def _group(raw: RawConfig, value: Json, where: str) -> Group:
    if isinstance(value, list):
        raise ConfigError(
            "QP-CFG-REFUSED",
            where,
            "is the name of a preset with a list of targets, whose arguments depend on the version that reads it",
            expected="an object with targets and weights, as writers store it",
            fix="Write the arguments out; compressed_tensors does when it saves the model.",
        )
    if not isinstance(value, dict):
        raise ConfigError("QP-CFG-FIELD", where, f"is {describe_json(value)}", expected="an object")
    fields = {key: item for key, item in value.items() if item is not None}
    unknown = sorted(fields.keys() - _KEYS)
    if unknown:
        raise ConfigError(
            "QP-CFG-UNKNOWN", f"{where}.{unknown[0]}", "is not known to this reader", expected=", ".join(sorted(_KEYS))
        )
    if "targets" not in fields:
        raise ConfigError("QP-CFG-FIELD", where, "targets is missing", expected="a list of texts")
    targets = suffix_entries(fields["targets"], f"{where}.targets")
    if "output_activations" in fields:
        raise ConfigError(
            "QP-CFG-REFUSED",
            f"{where}.output_activations",
            "quantized outputs of layers are not read",
            expected="null; a cache of keys and values is quantized by kv_cache_scheme",
            fix="Use a copy of the model without them.",
        )
    inputs = _args(fields, "input_activations", where)
    weights = _args(fields, "weights", where)
    if weights is None:
        note = f"{where} has no weights: those of its targets stay whole" + (
            ", and their activations are left as they are" if inputs is not None else ""
        )
        return Group(targets, None, (note,))
    form, notes = _format(raw, fields, weights, inputs, where)
    return Group(targets, scheme_ref(form, weights, inputs, where), notes)


def _args(fields: Mapping[str, Json], key: str, where: str) -> Args | None:
    if key not in fields:
        return None
    place = f"{where}.{key}"
    return read_args(get_mapping(fields, key, place), place)


def _format(
    raw: RawConfig, fields: Mapping[str, Json], weights: Args, inputs: Args | None, where: str
) -> tuple[str, tuple[str, ...]]:
    """Return a group's own format, else that of the file, else the one that follows; and what to note about it."""
    shared = raw.fields.get("format")
    if "format" in fields:
        own = check_format(fields["format"], f"{where}.format", whole=False)
        if shared is None or shared in (own, MIXED, *_UNCOMPRESSED):
            return own, ()
        check_format(shared, raw.origin("format"), whole=True)
        return own, (f"{where}.format is {own!r}, while {raw.origin('format')} is {shared!r}: the group's own counts",)
    if shared is not None and check_format(shared, raw.origin("format"), whole=True) != MIXED:
        return str(shared), ()
    form = infer_format(weights, inputs)
    return form, (f"{where} names no format: {form!r} follows from its arguments",)
