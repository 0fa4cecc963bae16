"""
The spelling `quant_method: "fbgemm_fp8"`: one scale per output row, activations scaled per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.skip import SchemeRef
from quantplug_fp8.fields import layer_rules, refuse_meaning, unknown_keys

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

_BOUND = "activation_scale_ub"
_READ = frozenset({"quant_method", "modules_to_not_convert", "ignored_layers", _BOUND})
_MEANING: dict[str, tuple[Json, ...]] = {
    "activation_scheme": ("dynamic",),
    "weight_block_size": (),
    "fmt": ("e4m3",),
    "kv_cache_scheme": (),
}
"""Keys of its sibling that would contradict what this method stores, with the values that do not."""


class FbgemmDialect(Dialect):
    """Reads FBGEMM configurations as Transformers and vLLM do."""

    name = "fbgemm_fp8"
    methods = ("fbgemm_fp8",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into one scheme for all linear layers, and rules for those that stay whole.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        refuse_meaning(raw, _MEANING)
        notes = unknown_keys(raw, _READ | _MEANING.keys())
        if _bound(raw) is not None:
            notes.append(
                f"{raw.origin(_BOUND)} caps the scales of activations, so that larger values are cut off; here every "
                "scale covers its largest value"
            )
        params = {"activation": "float8_e4m3fn/token/dynamic", "strategy": "channel"}
        return QuantConfig(
            self.name,
            SchemeRef("fp8", tuple(sorted(params.items()))),
            layer_rules(raw),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
            tuple(notes),
        )


def _bound(raw: RawConfig) -> float | None:
    """Return the upper bound of activation scales; raises `ConfigError` (`QP-CFG-FIELD`) unless it is above 0."""
    value = raw.fields.get(_BOUND)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(
            "QP-CFG-FIELD", raw.origin(_BOUND), f"{_BOUND} is {describe_json(value)}", expected="a number above 0"
        )
    return float(value)
