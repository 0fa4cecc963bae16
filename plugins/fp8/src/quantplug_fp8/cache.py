"""
What a configuration says about the cache of keys and values: handed on to the framework that owns it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.spec import ActivationSpec, ElementType
from quantplug_fp8.fields import word

if TYPE_CHECKING:
    from quantplug.config import RawConfig

KEYS = frozenset({"kv_cache_scheme", "kv_cache_quant_method", "kv_cache_quant_algo"})

_SCHEMES = {"static": "static", "dynamic": "dynamic"}
_METHODS = {
    "none": "",
    "auto": "",
    "fp8": ElementType.FLOAT8_E4M3FN.value,
    "fp8_e4m3": ElementType.FLOAT8_E4M3FN.value,
    "fp8_e4m3fn": ElementType.FLOAT8_E4M3FN.value,
    "fp8_e5m2": ElementType.FLOAT8_E5M2.value,
}


def kv_cache(raw: RawConfig) -> ActivationSpec | None:
    """
    Return how keys and values are to be quantized, None when the configuration is silent.

    `kv_cache_scheme` says whether scales are stored ("static", as where only the type is named) or computed; the other
    two keys name the type, which is float8_e4m3fn where only the scheme is given.

    Raises:
        ConfigError: `QP-CFG-FIELD`; `QP-CFG-CONTRADICTION` when the two names of the type differ.
    """
    scheme = word(raw, "kv_cache_scheme", _SCHEMES, "static") if raw.fields.get("kv_cache_scheme") is not None else ""
    methods = {
        key: word(raw, key, _METHODS, "none")
        for key in ("kv_cache_quant_method", "kv_cache_quant_algo")
        if raw.fields.get(key) is not None
    }
    if len(set(methods.values())) > 1 or (scheme and "" in methods.values()):
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            raw.origin(next(iter(methods))),
            f"does not agree with the other of {', '.join(key for key in sorted(KEYS) if key in raw.fields)}",
            expected="one type of the cached keys and values",
        )
    element = next(iter(methods.values()), ElementType.FLOAT8_E4M3FN.value if scheme else "")
    if not element:
        return None
    return ActivationSpec(ElementType(element), "tensor", dynamic=scheme == "dynamic")
