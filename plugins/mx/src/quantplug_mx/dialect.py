"""
Configurations whose `quant_method` is `mxfp8` or `mxfp4`; other methods that use these formats have their own dialects.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import path_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_str
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef
from quantplug_mx.mxfp4 import MXFP4Scheme
from quantplug_mx.mxfp8 import MXFP8Scheme
from quantplug_mx.parameters import EITHER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

_SKIPS = ("modules_to_not_convert", "ignored_layers")
"""Lists of layers that stay whole; writers use one or the other."""
_ACTIVATION = "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"
_BLOCK: list[Json] = [1, MXFP8Scheme.group]
_ONLY: dict[str, str] = {"fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
"""The one value that each of these has in MXFP8, and when it is absent."""
_LOADERS = frozenset({"quant_method", "dequantize", "packed_modules_mapping", *_SKIPS})
"""Keys that both read, or that say what one loader is to do, not what is stored."""
_MEANING = ("modules_to_convert", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups", "rotation_config")
"""Keys that would change what is stored, unless they say nothing."""
# Layers may have an `output` of their own, so only the model's counts.
_HEADS = (("lm_head", EntryKind.SUFFIX), ("embed_out", EntryKind.SUFFIX), ("output", EntryKind.EXACT))
_EXPERTS = "experts"
"""What experts are called below a layer."""
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class MXFP8Dialect(Dialect):
    """Reads MXFP8 configurations: the fields of block-wise FP8, with blocks of one row and 32 inputs."""

    name = "mxfp8"
    methods = ("mxfp8",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Check the fields against the one thing they can say, and turn the lists into rules.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-SKIP-PATTERN`.
        """
        for key, value in _ONLY.items():
            get_str(raw.fields, key, raw.origin(key), default=value, choices=(value,))
        block = raw.fields.get("weight_block_size")
        if block is not None and block != _BLOCK:
            raise ConfigError(
                "QP-CFG-FIELD",
                raw.origin("weight_block_size"),
                f"is {block if isinstance(block, list) else describe_json(block)}",
                expected=f"{_BLOCK}: one row and {MXFP8Scheme.group} inputs share a scale in MXFP8",
                fix="A file of 128 x 128 blocks is of quant_method 'fp8'.",
            )
        experts = raw.fields.get("expert_dtype")
        if experts not in (None, "fp8"):
            raise ConfigError(
                "QP-CFG-REFUSED",
                raw.origin("expert_dtype"),
                f"stores experts as {describe_json(experts)}",
                expected="'fp8': experts in another format than the rest are not read",
            )
        effective: dict[str, Json] = {**_ONLY, "weight_block_size": _BLOCK, "expert_dtype": "fp8"}
        return _config(self, raw, MXFP8Scheme.name, {"activation": _ACTIVATION, "scale_name": EITHER}, effective)


class MXFP4Dialect(Dialect):
    """
    Reads MXFP4 configurations.

    Who writes this method quantizes the experts of a model and nothing else, in tensors that hold all experts of a
    layer; which those are, the rules of the model's family say. In a model without experts, the tensors say which
    linear layers are quantized.
    """

    name = "mxfp4"
    methods = ("mxfp4",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the lists into rules.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-SKIP-PATTERN`.
        """
        config = _config(self, raw, MXFP4Scheme.name, {"scale_name": EITHER}, {})
        if not _has_experts(raw.model):
            return config
        entry = Entry(
            _EXPERTS, EntryKind.COMPONENT, _EXPERTS, "mxfp4: experts are quantized, all else is not", implied=True
        )
        return replace(config, default=None, rules=(*config.rules, Rule(entry, config.default)))


def _config(
    dialect: Dialect, raw: RawConfig, scheme: str, params: Mapping[str, Json], effective: Mapping[str, Json]
) -> QuantConfig:
    """
    Return one scheme for every linear layer but those that the lists name, and output heads.

    Args:
        dialect: which reads.
        raw: the configuration.
        scheme: name of the scheme.
        params: its parameters.
        effective: keys of this dialect alone, with what they are when they are absent.
    """
    for key in _MEANING:
        if raw.fields.get(key):
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                raw.origin(key),
                f"is {describe_json(raw.fields[key])}, which changes what is stored in a way that is not read",
                expected="none",
                fix="Use a copy of the model without it, or convert the dense model (quantplug convert).",
            )
    skipped = [Rule(entry) for key in _SKIPS for entry in path_entries(raw.fields.get(key), raw.origin(key))]
    origin = f"{dialect.name}: output heads stay whole"
    heads = [Rule(Entry(name, kind, name, origin, implied=True)) for name, kind in _HEADS]
    return QuantConfig(
        dialect.name,
        SchemeRef(scheme, tuple(sorted(params.items()))),
        (*skipped, *heads),
        tuple(Field(key, value, raw.origin(key)) for key, value in ({**effective, **raw.fields}).items()),
        tuple(
            f"{raw.origin(key)} is not known to this reader and left out of account"
            for key in raw.fields
            if key not in effective and key not in _LOADERS and key not in _MEANING
        ),
    )


def _has_experts(model: Mapping[str, Json]) -> bool:
    """Whether config.json counts more than one expert."""
    parts = [part for part in (model, model.get("text_config")) if isinstance(part, dict)]
    counts = [part.get(key) for part in parts for key in _EXPERT_COUNTS]
    return any(isinstance(count, int) and count > 1 for count in counts)
