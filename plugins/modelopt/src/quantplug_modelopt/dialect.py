"""
ModelOpt's spelling of a configuration: hf_quant_config.json, `quantization_config` in config.json, or both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import glob_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.skip import Rule
from quantplug.spec import ActivationSpec, ElementType
from quantplug_modelopt.algorithms import MIXED, algorithm
from quantplug_modelopt.description import read_description, refuse_meaning
from quantplug_modelopt.layers import check_groups, check_size, layer_rules

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug_modelopt.description import Stated

_KV_CACHES = {
    "FP8": ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False),
    "INT8": ActivationSpec(ElementType.INT8, "tensor", dynamic=False),
    "NVFP4": ActivationSpec(
        ElementType.FLOAT4_E2M1FN, "group", dynamic=True, group_size=16, scale_dtype="float8_e4m3fn", global_scale=True
    ),
}
"""`kv_cache_quant_algo` -> what a cached key or value is; the scales are stored beside `k_proj` and `v_proj`."""


class ModelOptDialect(Dialect):
    """Reads ModelOpt configurations."""

    name = "modelopt"
    methods = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
    """The first is ModelOpt's own; the others are names under which engines list its algorithms."""
    files = ("hf_quant_config.json",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: the excluded layers first, then, in a mixed file, those that are quantized.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        found = read_description(raw)
        rules = [Rule(entry) for entry in glob_entries(found.excluded.value, found.excluded.origin)]
        default = None
        if found.algo.value == MIXED:
            rules += layer_rules(found)
        else:
            stored = algorithm(found.algo.value, found.algo.origin)
            check_size(stored, found.group_size, raw.where)
            check_groups(found.groups, stored)
            default = stored.scheme
        for key, stated in found.meaning:
            refuse_meaning(key, stated.value, stated.origin)
        return QuantConfig(
            self.name,
            default,
            tuple(rules),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
            found.notes,
            kv_cache=_kv_cache(found.kv_cache),
        )


def _kv_cache(stated: Stated) -> ActivationSpec | None:
    if stated.value is None:
        return None
    spec = _KV_CACHES.get(str(stated.value))
    if spec is None:
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            stated.origin,
            f"the cache of keys and values is {describe_json(stated.value)}",
            expected=f"one of {', '.join(_KV_CACHES)}, or null",
            fix="A cache whose numbers are not known would be read wrongly; ask for the model without it.",
        )
    return spec
