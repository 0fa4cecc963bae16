"""
GPTQ's spelling of a configuration: `quantization_config` in config.json, or quantize_config.json beside it.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_mapping, get_str
from quantplug.names import GENERIC
from quantplug.skip import SchemeRef
from quantplug_gptq.fields import V1, V2, checkpoint_format, read_storage, refused_layout
from quantplug_gptq.keys import check_meaning, unknown_keys
from quantplug_gptq.rules import dynamic_rules, head_rules, positive_rules, skipped_rules
from quantplug_gptq.scheme import GPTQScheme

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

_WORD_SUBTRACTING_WRITER = "gptqmodel"


class GPTQDialect(Dialect):
    """Reads and writes GPTQ configurations."""

    name = "gptq"
    methods = ("gptq", "gptq_marlin", "marlin")
    """`gptq_marlin` is what some engines call plain GPTQ files that they repack themselves; `marlin` is refused."""
    files = ("quantize_config.json",)
    writes = frozenset({"gptq"})

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: `dynamic` first, then the output head, then lists of what is (not) quantized.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`.
        """
        layout = _layout(raw)
        check_meaning(raw.fields, raw.origin)
        base = read_storage(raw.fields, raw.origin)
        params: dict[str, Json] = {**asdict(base), "checkpoint_format": layout}
        if layout == V1 and _subtracts_words(raw):
            params["zeros_offset"] = "word"
        use = SchemeRef(GPTQScheme.name, tuple(sorted(params.items())))
        head = get_bool(raw.fields, "lm_head", raw.origin("lm_head"), default=False)
        positive = positive_rules(raw, use)
        rules = [*dynamic_rules(raw, base, use), *skipped_rules(raw)]
        notes = unknown_keys(raw)
        if positive and any(rule.use for rule in rules):
            notes.append(f"{raw.origin('dynamic')} counts before the list of what is quantized")
        if positive or not head:
            rules += head_rules(use if head else None, raw.origin("lm_head"))
        return QuantConfig(
            self.name,
            None if positive else use,
            (*rules, *positive),
            _fields(raw, layout, asdict(base), head),
            tuple(notes),
        )

    def write(self, base: SchemeRef, layers: Mapping[str, SchemeRef], dense: Collection[str]) -> dict[str, Json]:
        """
        Describe a converted checkpoint: the base scheme, and `dynamic` rules for the layers that differ from it.

        Raises:
            ConfigError: `QP-CFG-CONTRADICTION` when layers differ in what the whole file shares.
        """
        from importlib.metadata import version

        common = GPTQScheme.build(dict(base.params), "base")
        heads = {path for path in (*layers, *dense) if path.rpartition(".")[2] in GENERIC.heads}
        head = any(path in layers for path in heads)
        dynamic: dict[str, Json] = {}
        for path, ref in layers.items():
            scheme = GPTQScheme.build(dict(ref.params), path)
            if scheme != common:
                dynamic[f"+:^{re.escape(path)}$"] = _override(scheme, common)
        for path in dense:
            if head or path not in heads:
                dynamic[f"-:^{re.escape(path)}$"] = {}
        section: dict[str, Json] = {
            "quant_method": "gptq",
            "bits": common.bits,
            "group_size": common.group_size,
            "sym": common.sym,
            "desc_act": common.desc_act,
            "checkpoint_format": common.checkpoint_format,
            "pack_dtype": "int32",
            "lm_head": head,
            "meta": {"quantizer": [f"quantplug:{version('quantplug-gptq')}"]},
        }
        return section | ({"dynamic": dynamic} if dynamic else {})


def _override(scheme: GPTQScheme, common: GPTQScheme) -> dict[str, Json]:
    if scheme.checkpoint_format != common.checkpoint_format:
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            "checkpoint_format",
            f"is {scheme.checkpoint_format!r} for one layer and {common.checkpoint_format!r} for the rest",
            expected="one value for the whole file",
        )
    names = ("bits", "group_size", "sym", "desc_act")
    return {name: getattr(scheme, name) for name in names if getattr(scheme, name) != getattr(common, name)}


def _layout(raw: RawConfig) -> str:
    """Return `checkpoint_format`, which goes by three names, all of which must agree."""
    if raw.method == "marlin":
        raise refused_layout("marlin", raw.origin("quant_method"))
    if get_bool(raw.fields, "is_marlin_format", raw.origin("is_marlin_format"), default=False):
        raise refused_layout("marlin", raw.origin("is_marlin_format"))
    method = get_str(raw.fields, "method", raw.origin("method"), default="gptq")
    if method in ("marlin", "bitblas", "qqq"):
        raise refused_layout(method, raw.origin("method"))
    if method != "gptq":
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            raw.origin("method"),
            f"is {describe_json(method)}, while quant_method is {raw.method!r}",
            expected="'gptq'",
        )
    found = {
        key: checkpoint_format(raw.fields, key, raw.origin(key))
        for key in ("checkpoint_format", "format")
        if key in raw.fields
    }
    if len(set(found.values())) > 1:
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            raw.origin("format"),
            f"is {found['format']!r}, while {raw.origin('checkpoint_format')} is {found['checkpoint_format']!r}",
            expected="the same in both",
            fix=f"They decide how zero points are read ({V1!r}: stored less one, {V2!r}: as they are); correct one.",
        )
    return next(iter(found.values()), V1)


def _subtracts_words(raw: RawConfig) -> bool:
    """Whether the writer that the file names takes the one from whole words of zero points."""
    origin = raw.origin("meta")
    if raw.fields.get("meta") is None:
        return False
    quantizer = get_mapping(raw.fields, "meta", origin).get("quantizer")
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(name, str) and name.lower().partition(":")[0] == _WORD_SUBTRACTING_WRITER for name in names)


def _fields(raw: RawConfig, layout: str, base: Mapping[str, Json], head: bool) -> tuple[Field, ...]:
    """Return every key with its origin, absent ones that matter with their defaults."""
    effective = {**base, "checkpoint_format": layout, "lm_head": head}
    missing = [Field(key, value, raw.origin(key)) for key, value in effective.items() if key not in raw.fields]
    return (*(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()), *missing)
