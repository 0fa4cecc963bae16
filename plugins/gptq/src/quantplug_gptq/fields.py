"""
The fields that say how a GPTQ layer is stored, in a configuration or in the parameters of a scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import get_bool, get_int, get_str

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.jsonio import Json

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
"""Values of `checkpoint_format`: zero points stored less one, and as they are."""
_LARGEST_GROUP = 1 << 20

_OTHER_LAYOUTS = {
    "marlin": "its tensors may be laid out for one GPU kernel already, and the name does not tell which way",
    "marlin_24": "its weights are 2:4 sparse and laid out for one GPU kernel",
    "gptq_p": "it splits codes into bit planes, which this reader does not join",
    "bitblas": "its tensors are laid out for one GPU kernel",
    "qqq": "its activations are quantized, too",
    "gemm": "that is a layout of AWQ",
    "gemv": "that is a layout of AWQ",
    "gemv_fast": "that is a layout of AWQ",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """
    What a layer's own fields say, and what `dynamic` may override for a layer.

    Attributes:
        bits: width of one code.
        group_size: inputs per group, -1 for all.
        sym: whether every zero point is the middle one.
        desc_act: whether inputs were reordered.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


def read_storage(fields: Mapping[str, Json], origin: Callable[[str], str], base: Storage | None = None) -> Storage:
    """
    Read the four fields.

    Args:
        fields: the object that holds them.
        origin: where a key stands, for messages.
        base: values of absent keys; without it bits and group_size are mandatory.

    Raises:
        ConfigError: `QP-CFG-FIELD`; a bool is not an int here, and "4" is not 4.
    """
    defaults = (base.bits, base.group_size, base.sym, base.desc_act) if base else (None, None, True, False)
    bits, size, sym, desc_act = defaults
    size = get_int(fields, "group_size", origin("group_size"), default=size, minimum=-1, maximum=_LARGEST_GROUP)
    if size == 0:
        raise ConfigError(
            "QP-CFG-FIELD",
            origin("group_size"),
            "group_size is the integer 0",
            expected=f"-1 (one group over all inputs) or 1 to {_LARGEST_GROUP}",
        )
    return Storage(
        bits=get_int(fields, "bits", origin("bits"), default=bits, choices=BITS),
        group_size=size,
        sym=get_bool(fields, "sym", origin("sym"), default=sym),
        desc_act=get_bool(fields, "desc_act", origin("desc_act"), default=desc_act),
    )


def checkpoint_format(fields: Mapping[str, Json], key: str, origin: str) -> str:
    """
    Return one of `V1` (also when the key is absent) and `V2`.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-REFUSED` for a known layout that is not read, `QP-CFG-UNKNOWN` for others.
    """
    value = get_str(fields, key, origin, default=V1)
    if value in (V1, V2):
        return value
    if value in _OTHER_LAYOUTS:
        raise refused_layout(value, origin)
    raise ConfigError(
        "QP-CFG-UNKNOWN", origin, f"{key} {value!r} is not a known layout", expected=_READ, fix=_ASK_FOR_GPTQ
    )


def refused_layout(layout: str, origin: str) -> ConfigError:
    """Return the error for a layout that is recognised and not read."""
    return ConfigError(
        "QP-CFG-REFUSED",
        origin,
        f"the layout {layout!r} is not read: {_OTHER_LAYOUTS[layout]}",
        expected=_READ,
        fix=_ASK_FOR_GPTQ,
    )


_READ = f"{V1!r} or {V2!r}"
_ASK_FOR_GPTQ = "Use a copy of the model in plain GPTQ form, or convert the dense model (quantplug convert)."
