"""
The spellings under which engines serve plain INT8 files: `w8a8_int8` and `blockwise_int8`.

Both say little, because the engines fix the rest: symmetric codes, x quantized to int8 as it comes, and `weight_scale`
per output row or `weight_scale_inv` per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import path_entries, suffix_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_str
from quantplug.names import GENERIC
from quantplug.skip import Entry, EntryKind, Rule, SchemeRef
from quantplug_int8.scheme import Int8Scheme

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug.jsonio import Json

CHANNEL, BLOCK = "w8a8_int8", "blockwise_int8"
_BOOKKEEPING = frozenset({"quant_method", "activation_scheme", "packed_modules_mapping"})
_OWN = {
    CHANNEL: _BOOKKEEPING | {"ignore", "is_dynamic"},
    BLOCK: _BOOKKEEPING | {"ignored_layers", "modules_to_not_convert", "weight_block_size"},
}
_HEADS = tuple((name, EntryKind.EXACT if name == "output" else EntryKind.SUFFIX) for name in GENERIC.heads)


class PlainInt8Dialect(Dialect):
    """Reads the configurations of plain INT8 files."""

    name = "int8"
    methods = (CHANNEL, BLOCK)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into one scheme for all linear layers but the listed ones and the output head.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-REFUSED` for static activations, `QP-SKIP-PATTERN`.
        """
        _check_dynamic(raw)
        params: dict[str, Json] = {"activation": "int8/token/dynamic"}
        if raw.method == BLOCK:
            n, k = _block_size(raw)
            params = {
                "activation": f"int8/group{k}/dynamic",
                "block_k": k,
                "block_n": n,
                "scale_name": "weight_scale_inv",
                "strategy": "block",
            }
        entries = [
            *suffix_entries(raw.fields.get("ignore"), raw.origin("ignore")),
            *path_entries(raw.fields.get("ignored_layers"), raw.origin("ignored_layers")),
            *path_entries(raw.fields.get("modules_to_not_convert"), raw.origin("modules_to_not_convert")),
            *(Entry(name, kind, name, raw.where, implied=True) for name, kind in _HEADS),
        ]
        return QuantConfig(
            self.name,
            SchemeRef(Int8Scheme.name, tuple(sorted(params.items()))),
            tuple(Rule(entry) for entry in entries),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
            tuple(
                f"{raw.origin(key)} is not known to this reader and left out of account"
                for key in raw.fields
                if key not in _OWN[raw.method]
            ),
        )


def _check_dynamic(raw: RawConfig) -> None:
    """Refuse stored scales of x: none of the two methods says what they would be called."""
    scheme = get_str(
        raw.fields, "activation_scheme", raw.origin("activation_scheme"), default="dynamic",
        choices=("dynamic", "static"),
    )  # fmt: skip
    # False is what the engine that owns the key takes for granted, and it quantizes x as it comes all the same.
    get_bool(raw.fields, "is_dynamic", raw.origin("is_dynamic"), default=False)
    if scheme == "static":
        raise ConfigError(
            "QP-CFG-REFUSED",
            raw.origin("activation_scheme"),
            f"is 'static', and {raw.method} has no layout for stored activation scales",
            expected="'dynamic'",
            fix="Ask the maker of the file for one in the form of compressed-tensors, which says where they are.",
        )


def _block_size(raw: RawConfig) -> tuple[int, int]:
    """Return rows and inputs of a block."""
    value, origin = raw.fields.get("weight_block_size"), raw.origin("weight_block_size")
    if isinstance(value, list) and len(value) == 2:  # rows and inputs
        n, k = value
        if type(n) is int and type(k) is int and min(n, k) > 0:
            return n, k
    raise ConfigError(
        "QP-CFG-FIELD",
        origin,
        "is missing" if "weight_block_size" not in raw.fields else f"is {describe_json(value)}",
        expected="two integers above 0: rows and inputs of a block, such as [128, 128]",
    )
