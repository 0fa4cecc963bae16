"""
How scales are shared, in torchao's words (`PerRow`, `PerGroup`, …) and in ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_int
from quantplug_torchao.nodes import read_node, refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug_torchao.nodes import Node

    Sharing = Mapping[str, Json]

BY_ROW: Sharing = {"strategy": "channel"}


def of_weight(node: Node, key: str, default: Sharing) -> Sharing:
    """
    Return the parameters of the scheme that say how the scales of a weight are shared.

    Args:
        node: the configuration.
        key: the field that holds the granularity.
        default: what an absent one, or null, means.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`.
    """
    if node.fields.get(key) is None:
        return default
    return _granularity(node.fields[key], node.at(key))


def of_both(node: Node, default: str) -> tuple[Sharing, Sharing]:
    """
    Return how the scales of x, and those of the weight, are shared: one granularity for both, or a list of the two.

    Args:
        node: the configuration; its field is `granularity`.
        default: the class of granularity that null means.

    Raises:
        ConfigError: as `of_weight`.
    """
    value, where = node.fields.get("granularity"), node.at("granularity")
    if value is None:
        value = {"_type": default, "_data": {}}
    if not isinstance(value, list):
        one = _granularity(value, where)
        return one, one
    if len(value) != 2:  # x and the weight
        raise ConfigError(
            "QP-CFG-FIELD", where, f"is {describe_json(value)}", expected="an object, or two: for x and for the weight"
        )
    return _granularity(value[0], f"{where}[0]"), _granularity(value[1], f"{where}[1]")


def permission(element: str, sharing: Sharing, node: Node) -> str:
    """
    Return the text of a permission to quantize x; along a row of x, a block of one row is a group.

    Raises:
        ConfigError: `QP-CFG-REFUSED` for blocks of several rows.
    """
    match sharing["strategy"]:
        case "tensor":
            return f"{element}/tensor/dynamic"
        case "channel":
            return f"{element}/token/dynamic"
        case "group":
            return f"{element}/group{sharing['group_size']}/dynamic"
    if sharing["block_n"] != 1:
        raise refused(node.at("granularity"), f"x in blocks of {sharing['block_n']} rows", "blocks of one row of x")
    return f"{element}/group{sharing['block_k']}/dynamic"


def _granularity(value: Json, where: str) -> Sharing:
    node = read_node(value, where)
    match node.kind:
        case "PerTensor":
            node.check_known(())
            return {"strategy": "tensor"}
        case "PerRow":
            return _one_for_each_row(node, "dim", (-1, 1))
        case "PerAxis":
            return _one_for_each_row(node, "axis", (0,))
        case "PerGroup":
            node.check_known(("group_size",))
            return {"strategy": "group", "group_size": get_int(node.fields, "group_size", where, minimum=1)}
        case "PerBlock":
            node.check_known(("block_size",))
            n, k = _block(node)
            return {"strategy": "block", "block_n": n, "block_k": k}
    raise refused(f"{where}._type", f"{node.kind}: not a granularity that this reader knows", "PerRow, PerGroup, …")


def _one_for_each_row(node: Node, key: str, allowed: tuple[int, ...]) -> Sharing:
    node.check_known((key,))
    axis = get_int(node.fields, key, node.at(key), default=allowed[0])
    if axis not in allowed:
        raise refused(node.at(key), f"is {axis}: not one scale for each output", " or ".join(map(str, allowed)))
    return BY_ROW


def _block(node: Node) -> tuple[int, int]:
    """Return rows and inputs of a block."""
    value = node.fields.get("block_size")
    if isinstance(value, list) and len(value) == 2:  # rows and inputs
        n, k = value
        if type(n) is int and type(k) is int and min(n, k) > 0:
            return n, k
    raise ConfigError(
        "QP-CFG-FIELD", node.at("block_size"), f"is {describe_json(value)}", expected="[rows, inputs], both above 0"
    )
