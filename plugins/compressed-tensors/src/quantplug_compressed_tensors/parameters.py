"""
The parameters of the pack-quantized format, as the dialect or a caller spells them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import read_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_int, get_str
from quantplug.spec import ElementType, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, Granularity

KEYS = (
    "bits", "strategy", "group_size", "symmetric", "actorder", "activation", "grid", "scale_dtype",
)  # fmt: skip
BITS = (2, 3, 4, 8)
STRATEGIES = ("tensor", "channel", "group")
ORDERS = ("none", "group", "weight")
MINMAX, Q4_0 = "minmax", "q4_0"
GRIDS = (MINMAX, Q4_0)
"""How dense weights are put on the grid; the stored form is the same."""
SCALE_DTYPES = ("bfloat16", "float16", "float32")
Q4_0_SIZE = 32
LARGEST_GROUP = 1 << 20
_ACTIVATIONS = frozenset({
    ElementType.INT8, ElementType.UINT8, ElementType.INT4, ElementType.UINT4, ElementType.FLOAT8_E4M3FN,
})  # fmt: skip


def read_granularity(params: Mapping[str, Json], where: str) -> Granularity:
    """
    Read `strategy` and `group_size`; without a strategy, a group size means groups and its absence rows.

    Raises:
        ConfigError: `QP-CFG-FIELD` when one is out of range, or the two do not belong together.
    """
    grouped = params.get("group_size", -1) != -1
    strategy = get_str(
        params, "strategy", f"{where}: strategy", default="group" if grouped else "channel", choices=STRATEGIES
    )
    if grouped != (strategy == "group"):
        raise ConfigError(
            "QP-CFG-FIELD",
            f"{where}: group_size",
            f"group_size is {describe_json(params.get('group_size'))}, and strategy is {strategy!r}",
            expected="a group size with strategy 'group', and none (or -1) with any other",
        )
    match strategy:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case _:
            place = f"{where}: group_size"
            return PerGroup(get_int(params, "group_size", place, minimum=1, maximum=LARGEST_GROUP))


def read_order(params: Mapping[str, Json], granularity: Granularity, where: str) -> str:
    """
    Read `actorder`; only "group" changes what is stored.

    Raises:
        ConfigError: `QP-CFG-FIELD` for another value, and for an order of groups where there are none.
    """
    place = f"{where}: actorder"
    order = get_str(params, "actorder", place, default=ORDERS[0], choices=ORDERS)
    if order == "group" and not isinstance(granularity, PerGroup):
        raise ConfigError("QP-CFG-FIELD", place, "actorder is 'group', and there are no groups", expected="'none'")
    return order


def read_permission(params: Mapping[str, Json], where: str) -> ActivationSpec | None:
    """
    Read `activation`: integers or 8-bit floats; stored scales are one per tensor.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    place = f"{where}: activation"
    spec = read_activation(params.get("activation"), place)
    if spec is None:
        return None
    known = spec.element in _ACTIVATIONS and spec.scale_dtype == "float32"
    if not known or not (spec.dynamic or spec.granularity == "tensor"):
        raise ConfigError(
            "QP-CFG-FIELD",
            place,
            f"activation is {describe_json(params['activation'])}",
            expected=f"one of {', '.join(sorted(_ACTIVATIONS))} with scales that are not rounded; stored ones are one "
            "per tensor",
        )
    return spec


def read_grid(params: Mapping[str, Json], where: str) -> str:
    """
    Read `grid`.

    Raises:
        ConfigError: `QP-CFG-FIELD`, also where the other parameters are not those that the grid is defined for.
    """
    place = f"{where}: grid"
    grid = get_str(params, "grid", place, default=MINMAX, choices=GRIDS)
    stated = {"symmetric": True, **params}
    needed = {"bits": 4, "group_size": Q4_0_SIZE, "symmetric": True}
    if grid == Q4_0 and any(stated.get(key) != value for key, value in needed.items()):
        raise ConfigError("QP-CFG-FIELD", place, "grid is 'q4_0'", expected="4 bits, group_size 32, symmetric")
    return grid


def read_scale_dtype(params: Mapping[str, Json], grid: str, where: str) -> str:
    """Read `scale_dtype`: float16 by default for q4_0, which is defined with it, else bfloat16."""
    default = "float16" if grid == Q4_0 else SCALE_DTYPES[0]
    return get_str(params, "scale_dtype", f"{where}: scale_dtype", default=default, choices=SCALE_DTYPES)
