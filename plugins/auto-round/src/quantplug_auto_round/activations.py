"""
What auto-round's fields permit about activations, in the words that schemes read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_int, get_str

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.jsonio import Json

_WHOLE_BITS = 16
_SHARED = {0: "tensor", -1: "token"}
# act_data_type -> width -> what is behind the group: element, dtype of dynamic scales
_ROUNDED = {
    "mx_fp": {4: ("float4_e2m1fn", "float8_e8m0fnu"), 8: ("float8_e4m3fn", "float8_e8m0fnu")},
    "nv_fp4_with_static_gs": {4: ("float4_e2m1fn", "float8_e4m3fn+global")},
}


def read_activation(fields: Mapping[str, Json], origin: Callable[[str], str]) -> str:
    """
    Return the text of `quantplug.activations` that the `act_…` fields stand for, "none" without any.

    Raises:
        ConfigError: `QP-CFG-FIELD`, or `QP-CFG-REFUSED` for kinds that no file was seen with.
    """
    if fields.get("act_bits") is None:
        return "none"
    bits = get_int(fields, "act_bits", origin("act_bits"), minimum=1)
    if bits >= _WHOLE_BITS:
        return "none"
    if not get_bool(fields, "act_sym", origin("act_sym"), default=True):
        raise ConfigError("QP-CFG-REFUSED", origin("act_sym"), "act_sym is false", expected="true")
    kind = get_str(fields, "act_data_type", origin("act_data_type"), default="int")
    dynamic = get_bool(fields, "act_dynamic", origin("act_dynamic"), default=True)
    size = get_int(fields, "act_group_size", origin("act_group_size"), minimum=-1)
    when = "dynamic" if dynamic else "static"
    shared = _SHARED.get(size, f"group{size}")
    if kind == "int" and bits == 8:
        return f"int8/{shared}/{when}"
    if kind == "fp" and bits == 8:
        return f"float8_e4m3fn/{shared}/{when}"
    if kind in _ROUNDED and bits in _ROUNDED[kind] and dynamic and size > 0:
        element, scale = _ROUNDED[kind][bits]
        return f"{element}/{shared}/dynamic/{scale}"
    raise ConfigError(
        "QP-CFG-REFUSED",
        origin("act_data_type"),
        f"activations of {bits} bits, {when}, are of type {describe_json(kind)}",
        expected="'int' or 'fp' with 8 bits, 'mx_fp' with 4 or 8, or 'nv_fp4_with_static_gs' with 4, which are dynamic",
    )
