"""
The fields that say how a GPTQ layer is stored, read strictly: a bool is not an int here, and "4" is not 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError

if TYPE_CHECKING:
    from quantplug.jsonio import Json

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
"""Values of `checkpoint_format`: zero points stored less one, and as they are."""
LARGEST_GROUP = 1 << 20

_REFUSED = {
    "marlin": "its tensors may be laid out for one GPU kernel already, and the name does not tell which way",
    "gptq_p": "it splits codes into bit planes, which this reader does not join",
    "bitblas": "its tensors are laid out for one GPU kernel",
    "marlin_24": "its weights are 2:4 sparse and laid out for one GPU kernel",
    "qqq": "its activations are quantized, too",
    "gemm": "that is a layout of AWQ",
    "gemv": "that is a layout of AWQ",
    "gemv_fast": "that is a layout of AWQ",
}


def read_bits(value: Json, where: str) -> int:
    """
    Return `bits`.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    if type(value) is not int or value not in BITS:
        raise _wrong(value, where, "2, 3, 4 or 8")
    return value


def read_group_size(value: Json, where: str) -> int:
    """
    Return `group_size`; -1 is one group over all inputs.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    if type(value) is not int or not (value == -1 or 1 <= value <= LARGEST_GROUP):
        raise _wrong(value, where, f"-1 (one group over all inputs) or 1 to {LARGEST_GROUP}")
    return value


def read_flag(value: Json, where: str) -> bool:
    """
    Return a field that is true or false.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value


def read_format(value: Json, where: str) -> str:
    """
    Return `checkpoint_format`, one of `V1` and `V2`.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-REFUSED` for a known layout that is not read, `QP-CFG-UNKNOWN` for others.
    """
    if not isinstance(value, str):
        raise _wrong(value, where, f"{V1!r} or {V2!r}")
    if value in (V1, V2):
        return value
    if value in _REFUSED:
        raise refused(where, value)
    raise ConfigError(
        "QP-CFG-UNKNOWN", where, f"{value!r} is not a known layout", expected=f"{V1!r} or {V2!r}", fix=_ASK_FOR_GPTQ
    )


def refused(where: str, layout: str) -> ConfigError:
    """Return the error for a layout that is recognised and not read."""
    return ConfigError(
        "QP-CFG-REFUSED",
        where,
        f"{layout!r} is not read: {_REFUSED[layout]}",
        expected=f"{V1!r} or {V2!r}",
        fix=_ASK_FOR_GPTQ,
    )


_ASK_FOR_GPTQ = "Use a copy of the model in plain GPTQ form, or convert the dense model with `quantplug convert`."


def _wrong(value: Json, where: str, expected: str) -> ConfigError:
    shown = repr(value)
    return ConfigError(
        "QP-CFG-FIELD", where, f"is {shown if len(shown) <= 60 else shown[:57] + '...'}", expected=expected
    )
