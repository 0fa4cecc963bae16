"""
The keys of a compressed-tensors section besides its groups: what is known, and what would change what tensors mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

READ = frozenset({
    "quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status",
    "quantization_config", "sparsity_config", "transform_config", "moe_sparsity_config",
})  # fmt: skip
"""Keys that the dialect acts on."""
BOOKKEEPING = frozenset(
    {"version", "global_compression_ratio", "run_compressed", "dequantize", "use_optimized_inference"}
)
"""Keys that say nothing about the tensors; listed and left out of account."""
_STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
_MEANING = {
    "sparsity_config": "zeros would be left out of the stored weights; no current writer does that",
    "transform_config": "rotations would have to be applied to x while running",
    "moe_sparsity_config": "layers would have different numbers of experts",
}


def check_meaning(raw: RawConfig) -> None:
    """
    Refuse sections that change what the tensors mean, unless they say nothing.

    Old writers left a `sparsity_config` of format "dense", which only measures how many weights are 0.

    Raises:
        ConfigError: `QP-CFG-REFUSED`, or `QP-CFG-FIELD` for a status never heard of.
    """
    for key, meaning in _MEANING.items():
        value = raw.fields.get(key)
        if _says_nothing(value) or (key == "sparsity_config" and isinstance(value, dict) and _is_dense(value)):
            continue
        form = value.get("format") if isinstance(value, dict) else None
        raise ConfigError(
            "QP-CFG-REFUSED",
            raw.origin(key),
            f"is {describe_json(value)}" + (f" of format {form!r}" if isinstance(form, str) else "") + f": {meaning}",
            expected="nothing",
            fix="Use another copy of the model, or convert the dense model (quantplug convert).",
        )
    status = raw.fields.get("quantization_status")
    if status is not None and status not in _STATUSES:
        raise ConfigError(
            "QP-CFG-FIELD",
            raw.origin("quantization_status"),
            f"quantization_status is {describe_json(status)}",
            expected=f"one of {', '.join(_STATUSES)}; the tensors show what is stored",
        )


def unknown_keys(raw: RawConfig) -> list[str]:
    """Return notes about keys that nobody here has heard of."""
    return [
        f"{raw.origin(key)} is not known to this reader and left out of account"
        for key in raw.fields
        if key not in READ and key not in BOOKKEEPING
    ]


def _says_nothing(value: Json) -> bool:
    if isinstance(value, dict):
        return all(_says_nothing(item) for item in value.values())
    return value is None or value == []


def _is_dense(value: dict[str, Json]) -> bool:
    return value.get("format") == "dense"
