"""
The parameters of the FP8 format, as a dialect or a caller spells them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import read_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_int, get_str
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, Granularity

KEYS = ("element", "strategy", "group_size", "block_n", "block_k", "scale_name", "inverse", "activation")
ELEMENTS = (
    ElementType.FLOAT8_E4M3FN,
    ElementType.FLOAT8_E5M2,
    ElementType.FLOAT8_E4M3FNUZ,
    ElementType.FLOAT8_E5M2FNUZ,
)
STRATEGIES = ("tensor", "channel", "group", "block")
SCALE_NAMES = ("weight_scale", "weight_scale_inv")
EITHER = "either"
"""The file has one of the spellings, its configuration does not say which."""
INPUT_NAMES = ("input_scale", "activation_scale")
_BLOCK = 128
_LARGEST = 1 << 20
_SIZES = {"group_size": "group", "block_n": "block", "block_k": "block"}


def read_element(params: Mapping[str, Json], where: str) -> ElementType:
    """Read `element`, float8_e4m3fn where it is absent; raises `ConfigError` (`QP-CFG-FIELD`)."""
    default = ELEMENTS[0].value
    return ElementType(get_str(params, "element", f"{where}: element", default=default, choices=ELEMENTS))


def read_granularity(params: Mapping[str, Json], where: str) -> Granularity:
    """
    Read `strategy`, "channel" where it is absent, and the sizes that belong to it.

    Raises:
        ConfigError: `QP-CFG-FIELD` when one is missing, out of range, or belongs to another strategy.
    """
    strategy = get_str(params, "strategy", f"{where}: strategy", default="channel", choices=STRATEGIES)
    for key, owner in _SIZES.items():
        if key in params and owner != strategy:
            raise ConfigError(
                "QP-CFG-FIELD",
                f"{where}: {key}",
                f"{key} is given, and strategy is {strategy!r}",
                expected=f"strategy {owner!r}, or no {key}",
            )

    def size(key: str, default: int | None = None) -> int:
        return get_int(params, key, f"{where}: {key}", default=default, minimum=1, maximum=_LARGEST)

    match strategy:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "group":
            return PerGroup(size("group_size"))
        case _:
            return PerBlock(size("block_n", _BLOCK), size("block_k", _BLOCK))


def read_scale_name(params: Mapping[str, Json], where: str) -> str:
    """Read `scale_name`: one of the two spellings, or `EITHER`; raises `ConfigError` (`QP-CFG-FIELD`)."""
    choices = (*SCALE_NAMES, EITHER)
    return get_str(params, "scale_name", f"{where}: scale_name", default=SCALE_NAMES[0], choices=choices)


def read_inverse(params: Mapping[str, Json], where: str) -> bool:
    """Read `inverse`, whether values are codes divided by scales; raises `ConfigError` (`QP-CFG-FIELD`)."""
    return get_bool(params, "inverse", f"{where}: inverse", default=False)


def read_permission(params: Mapping[str, Json], where: str) -> ActivationSpec | None:
    """
    Read `activation`: 8-bit floats, one stored scale per tensor or dynamic ones.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    place = f"{where}: activation"
    spec = read_activation(params.get("activation"), place)
    if spec is None:
        return None
    if spec.element not in ELEMENTS or spec.global_scale or not (spec.dynamic or spec.granularity == "tensor"):
        raise ConfigError(
            "QP-CFG-FIELD",
            place,
            f"activation is {describe_json(params['activation'])}",
            expected=f"one of {', '.join(ELEMENTS)}, without a global scale; static scales are one per tensor",
        )
    return spec
