"""
The parameters of the int8 format, as a dialect or a caller spells them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import read_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import get_bool, get_int, get_str
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, Granularity

KEYS = (
    "bits", "strategy", "group_size", "block_n", "block_k", "symmetric", "scale_name", "activation",
)  # fmt: skip
BITS = (8, 4)
SCALE_NAMES = ("weight_scale", "weight_scale_inv")
STRATEGIES = ("channel", "tensor", "group", "block")
_SIZES = {"group_size": "group", "block_n": "block", "block_k": "block"}
_BLOCK = 128
_LARGEST = 1 << 20
_ACTIVATIONS = frozenset({
    ElementType.INT8, ElementType.UINT8, ElementType.INT4, ElementType.UINT4, ElementType.FLOAT8_E4M3FN,
    ElementType.FLOAT8_E5M2,
})  # fmt: skip


def read_granularity(params: Mapping[str, Json], where: str) -> Granularity:
    """
    Read `strategy` and the sizes that belong to it.

    Raises:
        ConfigError: `QP-CFG-FIELD` when one is missing, out of range, or belongs to another strategy.
    """
    strategy = get_str(params, "strategy", f"{where}: strategy", default="channel", choices=STRATEGIES)
    for key, owner in _SIZES.items():
        if key in params and owner != strategy:
            raise ConfigError(
                "QP-CFG-FIELD",
                f"{where}: {key}",
                f"is given for strategy {strategy!r}",
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


def read_symmetric(params: Mapping[str, Json], granularity: Granularity, where: str) -> bool:
    """
    Read `symmetric`.

    Raises:
        ConfigError: `QP-CFG-FIELD` for another type, and for blocks with zero points, which no writer has.
    """
    symmetric = get_bool(params, "symmetric", f"{where}: symmetric", default=True)
    if not symmetric and isinstance(granularity, PerBlock):
        raise ConfigError(
            "QP-CFG-FIELD",
            f"{where}: symmetric",
            "is false for strategy 'block'",
            expected="true: blocks have no zeros",
        )
    return symmetric


def read_activations(params: Mapping[str, Json], where: str) -> ActivationSpec | None:
    """
    Read `activation`: integers or 8-bit floats; stored scales are one per tensor.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    place = f"{where}: activation"
    spec = read_activation(params.get("activation"), place)
    if spec is None:
        return None
    if spec.element not in _ACTIVATIONS or spec.scale_dtype != "float32":
        raise ConfigError(
            "QP-CFG-FIELD",
            place,
            f"is {params['activation']!r}",
            expected=f"one of {', '.join(sorted(_ACTIVATIONS))}, with scales that are not rounded",
        )
    if not spec.dynamic and spec.granularity != "tensor":
        raise ConfigError(
            "QP-CFG-FIELD",
            place,
            f"is {params['activation']!r}",
            expected="'tensor' for stored scales: a file holds one input_scale per layer",
        )
    return spec
