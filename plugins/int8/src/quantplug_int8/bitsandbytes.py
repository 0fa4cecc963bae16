"""
bitsandbytes configurations: recognised, and refused by name with what to do instead.

What they describe is not one number format but how one library computes (LLM.int8()), or 4-bit codes under scales that
are quantized themselves; and very often nothing is quantized yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect
from quantplug.errors import ConfigError
from quantplug.jsonio import get_bool, get_str

if TYPE_CHECKING:
    from quantplug.config import QuantConfig, RawConfig

_ON_LOAD = (
    "If the tensors are dense (one `weight` in bfloat16 or float16 per layer, as where a configuration only asks for "
    "quantizing on load), take quantization_config out of config.json and say {}. Otherwise start from the dense "
    "model: quantplug convert, or the same wish."
)


class BitsAndBytesDialect(Dialect):
    """Knows bitsandbytes configurations and says why each form is not read."""

    name = "bitsandbytes"
    methods = ("bitsandbytes", "bnb")

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Refuse the configuration.

        Raises:
            ConfigError: `QP-CFG-REFUSED` always, but `QP-CFG-FIELD` for a field of the wrong type and
                `QP-CFG-CONTRADICTION` for both widths at once.
        """
        wide, narrow = (_asks(raw, key) for key in ("load_in_8bit", "load_in_4bit"))
        if wide and narrow:
            raise ConfigError(
                "QP-CFG-CONTRADICTION", raw.where, "says both load_in_8bit and load_in_4bit", expected="one of the two"
            )
        if narrow:
            raise _refused(raw, "load_in_4bit", _four_bits(raw), 'quantize="mxfp4" or quantize="int4-g64"')
        if wide:
            raise _refused(
                raw,
                "load_in_8bit",
                "LLM.int8() is not read: it multiplies inputs that exceed a threshold apart, in 16 bits, so that int8 "
                "weights (`weight` and `SCB`) are only half of what it computes",
                'quantize="int8" or quantize="w8a8"',
            )
        raise _refused(raw, "quant_method", "neither load_in_8bit nor load_in_4bit is set", 'quantize="int8"')


def _asks(raw: RawConfig, key: str) -> bool:
    """Return whether a width is asked for, under its public name or the one that some versions saved."""
    return any(get_bool(raw.fields, name, raw.origin(name), default=False) for name in (key, f"_{key}"))


def _four_bits(raw: RawConfig) -> str:
    kind = get_str(raw.fields, "bnb_4bit_quant_type", raw.origin("bnb_4bit_quant_type"), default="fp4")
    key = "bnb_4bit_use_double_quant"
    nested = get_bool(raw.fields, key, raw.origin(key), default=False)
    return (
        f"4-bit codes of type {kind!r} are not read: their 16 values are a table of their own, on no grid that kernels "
        "know" + (", and their scales are quantized once more (`nested_absmax`)" if nested else "")
    )


def _refused(raw: RawConfig, key: str, what: str, instead: str) -> ConfigError:
    return ConfigError(
        "QP-CFG-REFUSED",
        raw.origin(key if key in raw.fields else f"_{key}" if f"_{key}" in raw.fields else "quant_method"),
        what,
        expected="a format that stores what it computes with",
        fix=_ON_LOAD.format(instead),
    )
