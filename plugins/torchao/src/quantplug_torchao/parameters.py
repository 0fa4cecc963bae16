"""
The parameters of the torchao format, as the dialect or a caller spells them.
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

KEYS = ("element", "strategy", "group_size", "block_n", "block_k", "symmetric", "activation")
FLOATS = (ElementType.FLOAT8_E4M3FN.value, ElementType.FLOAT8_E5M2.value)
CANONICAL_BITS = {"int1": 2, "int2": 2, "int3": 3, "int4": 4, "int5": 8, "int6": 8, "int7": 8, "int8": 8}
"""Integers that torchao stores one per byte, and the least canonical width that holds them."""
STRATEGIES = ("channel", "tensor", "group", "block")
_SIZES = {"group_size": "group", "block_n": "block", "block_k": "block"}
_LARGEST = 1 << 20
_ACTIVATIONS = frozenset({ElementType.INT8, ElementType.UINT8, ElementType.FLOAT8_E4M3FN, ElementType.FLOAT8_E5M2})


def read_element(params: Mapping[str, Json], where: str) -> str:
    """Read `element`, torch's name of the type of a code; raises `ConfigError` (`QP-CFG-FIELD`)."""
    return get_str(params, "element", f"{where}: element", default="int8", choices=(*CANONICAL_BITS, *FLOATS))


def read_granularity(params: Mapping[str, Json], element: str, where: str) -> Granularity:
    """
    Read `strategy` and the sizes that belong to it.

    Raises:
        ConfigError: `QP-CFG-FIELD` when one is missing, out of range, belongs to another strategy, or asks for blocks
            of integers, which torchao does not have.
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

    def size(key: str) -> int:
        return get_int(params, key, f"{where}: {key}", minimum=1, maximum=_LARGEST)

    match strategy:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "group":
            return PerGroup(size("group_size"))
    if element not in FLOATS:
        raise ConfigError(
            "QP-CFG-FIELD", f"{where}: strategy", f"is 'block' for {element}", expected=f"{' or '.join(FLOATS)}"
        )
    return PerBlock(size("block_n"), size("block_k"))


def read_symmetric(params: Mapping[str, Json], element: str, where: str) -> bool:
    """Read `symmetric`; raises `ConfigError` (`QP-CFG-FIELD`), also where floats are said to have zero points."""
    symmetric = get_bool(params, "symmetric", f"{where}: symmetric", default=True)
    if element in FLOATS and not symmetric:
        raise ConfigError(
            "QP-CFG-FIELD", f"{where}: symmetric", f"is false for {element}", expected="true: floats have no zeros"
        )
    return symmetric


def read_permission(params: Mapping[str, Json], where: str) -> ActivationSpec | None:
    """Read `activation`, bytes with dynamic scales; raises `ConfigError` (`QP-CFG-FIELD`)."""
    place = f"{where}: activation"
    spec = read_activation(params.get("activation"), place)
    if spec is not None and not (spec.dynamic and spec.element in _ACTIVATIONS and spec.scale_dtype == "float32"):
        raise ConfigError(
            "QP-CFG-FIELD",
            place,
            f"is {params['activation']!r}",
            expected=f"{', '.join(sorted(_ACTIVATIONS))}, dynamic, with scales that are not rounded",
        )
    return spec
