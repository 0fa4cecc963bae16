"""
The fields that say how an AWQ layer is stored, in a configuration or in the parameters of a scheme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import get_int

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json

BITS = (4,)
GEMM, GEMV = "gemm", "gemv"
_LARGEST_GROUP = 1 << 20
_GEMV_GROUPS = (16, 32, 64)
_NARROW = 128
"""Groups of fewer inputs widen GEMV's zero points, so only those whose width is known are read."""

_SAME_AS_GEMM = ("exllama", "exllamav2", "ipex")
"""Versions that choose a kernel for files in GEMM's layout."""
_REFUSED = {
    "gemv_fast": "it stores zero points multiplied by their scales and rounded, so that values are not "
    "(code - zero) * scale",
    "llm-awq": "it stores zero points multiplied by their scales and rounded, so that values are not "
    "(code - zero) * scale",
    "marlin": "its tensors are laid out for one GPU kernel",
    "bitblas": "its tensors are laid out for one GPU kernel",
}


def read_bits(fields: Mapping[str, Json], key: str, where: str, default: int | None = None) -> int:
    """
    Read the width of a code.

    Raises:
        ConfigError: `QP-CFG-REFUSED` for widths that some writers have and pack differently from each other;
            `QP-CFG-FIELD`.
    """
    bits = get_int(fields, key, where, default=default, minimum=1)
    if bits in BITS:
        return bits
    if bits in (2, 3, 5, 6, 7, 8):
        raise ConfigError(
            "QP-CFG-REFUSED",
            where,
            f"{key} is {bits}, which auto-round and GPTQModel pack in two different orders",
            expected="4",
            fix="Use a copy of the model with 4 bits, or in another form (GPTQ has 2, 3 and 8 bits).",
        )
    raise ConfigError("QP-CFG-FIELD", where, f"{key} is the integer {bits}", expected="4")


def read_group_size(fields: Mapping[str, Json], key: str, where: str, default: int | None = None) -> int:
    """Read the inputs per group, -1 for all; raises `ConfigError` (`QP-CFG-FIELD`)."""
    size = get_int(fields, key, where, default=default, minimum=-1, maximum=_LARGEST_GROUP)
    if size == 0:
        raise ConfigError(
            "QP-CFG-FIELD",
            where,
            f"{key} is the integer 0",
            expected=f"-1 (one group over all inputs) or 1 to {_LARGEST_GROUP}",
        )
    return size


def layout_of(version: str, where: str) -> str:
    """
    Return `GEMM` or `GEMV`, the layout that a `version` stands for; case does not matter.

    Raises:
        ConfigError: `QP-CFG-REFUSED` for a known layout that is not read, `QP-CFG-UNKNOWN` for others.
    """
    name = version.lower()
    if name in (GEMM, GEMV):
        return name
    if name in _SAME_AS_GEMM:
        return GEMM
    expected = " or ".join(map(repr, (GEMM, GEMV, *_SAME_AS_GEMM)))
    if name in _REFUSED:
        raise ConfigError(
            "QP-CFG-REFUSED",
            where,
            f"the layout {version!r} is not read: {_REFUSED[name]}",
            expected=expected,
            fix="Use a copy of the model in GEMM form, which every writer offers.",
        )
    raise ConfigError("QP-CFG-UNKNOWN", where, f"{version!r} is not a known layout", expected=expected)


def unfit(version: str, group_size: int, rows: int, inputs: int) -> str:
    """
    Return why a layer of that size has no place in a layout, "" when it has one.

    Args:
        version: the layout.
        group_size: inputs per group, -1 for all.
        rows: N.
        inputs: K.
    """
    packed, name = (rows, "out_features") if version == GEMM else (inputs, "in_features")
    if packed % 8:
        return f"{name} {packed} is not a multiple of 8, the codes of a word"
    size = inputs if group_size == -1 else group_size
    if size and inputs % size:
        return f"in_features {inputs} is not a multiple of group_size {size}"
    if version == GEMV and size < _NARROW and size not in _GEMV_GROUPS:
        return f"GEMV's layout is not defined for groups of {size} inputs"
    return ""


def gemv_words(groups: int, size: int) -> int:
    """
    Return the words of zero points that GEMV's layout has per row.

    Eight zero points take a word; rows are filled up to one word for every 128 inputs of a group that are missing.

    Args:
        groups: G.
        size: inputs per group.
    """
    unit = 1 if size >= _NARROW else _NARROW // size
    return (groups + 8 * unit - 1) // (8 * unit) * unit
