"""
What each configuration class of torchao means here: a scheme, and a note where a permission is left out.

Source: `torchao/quantization/quant_api.py` of versions 0.15, 0.17 and 0.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.jsonio import describe_json, get_bool
from quantplug.skip import SchemeRef
from quantplug_torchao import sharing
from quantplug_torchao.nodes import read_node, refused
from quantplug_torchao.parameters import CANONICAL_BITS, FLOATS
from quantplug_torchao.refusals import CONFIGURATIONS
from quantplug_torchao.sharing import BY_ROW

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.jsonio import Json
    from quantplug_torchao.nodes import Node
    from quantplug_torchao.sharing import Sharing

    Form = tuple[SchemeRef, str]

_HOW = frozenset({
    "set_inductor_config", "weight_only_decode", "mm_config", "kernel_preference", "alg_id", "scale_dtype",
    "weight_scale_dtype",
})  # fmt: skip
"""Fields about how to compute, or about what the stored tensors say themselves."""
_INTX = frozenset({"layout", "intx_packing_format", "intx_choose_qparams_algorithm", "weight_dtype"})
_FIELDS = {
    "Int8WeightOnlyConfig": {"group_size", "granularity"},
    "Int8DynamicActivationInt8WeightConfig": {"act_mapping_type", "granularity", "reduce_range", "layout"},
    "IntxWeightOnlyConfig": _INTX | {"granularity", "mapping_type"},
    "Int8DynamicActivationIntxWeightConfig": _INTX | {"weight_granularity", "weight_mapping_type", "act_mapping_type"},
    "Float8WeightOnlyConfig": {"weight_dtype", "granularity"},
    "Float8DynamicActivationFloat8WeightConfig": {
        "activation_dtype", "weight_dtype", "granularity", "packing_format", "activation_value_lb",
        "activation_value_ub",
    },
}  # fmt: skip
_VERSION = 2
"""The version of these classes whose tensors torchao stores in safetensors."""
_SYMMETRIC, _ASYMMETRIC = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"), "ASYMMETRIC"
_KEPT = "which no kernel here does; it keeps its precision"


def read_form(node: Node) -> Form:
    """
    Return the scheme of the linear layers that a configuration is about, and a note or "".

    Raises:
        ConfigError: `QP-CFG-REFUSED` with the reason for what is known and not read, `QP-CFG-UNKNOWN`, `QP-CFG-FIELD`.
    """
    reader = _READERS.get(node.kind)
    if reader is None:
        reason = CONFIGURATIONS.get(node.kind, "not a configuration that this reader knows")
        raise refused(f"{node.where}._type", f"{node.kind}: {reason}", f"one of {', '.join(_READERS)}")
    if node.version != _VERSION:
        raise refused(
            f"{node.where}._version",
            f"is {node.version}: its tensors are of other classes, which torchao stores as pickles only",
            f"{_VERSION}",
        )
    node.check_known(_FIELDS[node.kind] | _HOW)
    return reader(node)


def _int8_weight_only(node: Node) -> Form:
    size = node.fields.get("group_size")
    if size is not None:
        raise refused(node.at("group_size"), f"is {describe_json(size)}", "null, and the size in granularity")
    return _ref("int8", sharing.of_weight(node, "granularity", BY_ROW)), ""


def _int8_dynamic(node: Node) -> Form:
    _check_layout(node, "PlainLayout")
    inputs, weights = sharing.of_both(node, "PerRow")
    mapping = node.word("act_mapping_type", "MappingType", _SYMMETRIC[0], (_SYMMETRIC[0], _ASYMMETRIC))
    if get_bool(node.fields, "reduce_range", node.at("reduce_range"), default=False):
        return _ref("int8", weights), f"{node.at('reduce_range')}: x is rounded to 7 bits, {_KEPT}"
    element = "uint8" if mapping == _ASYMMETRIC else "int8"
    return _ref("int8", weights, activation=sharing.permission(element, inputs, node)), ""


def _intx_weight_only(node: Node) -> Form:
    return _intx(node, "", BY_ROW, "none"), ""


def _intx_dynamic(node: Node) -> Form:
    node.word("act_mapping_type", "MappingType", _ASYMMETRIC, (_ASYMMETRIC,))
    return _intx(node, "weight_", {"strategy": "group", "group_size": 32}, "uint8/token/dynamic"), ""


def _intx(node: Node, prefix: str, default: Sharing, activation: str) -> SchemeRef:
    """Return the scheme of integers of 1 to 8 bits; `prefix` is that of the fields about the weight."""
    _check_layout(node, "QDQLayout")
    plain = "UNPACKED_TO_INT8"
    packing = node.word("intx_packing_format", "IntxPackingFormat", plain)
    if packing != plain:
        raise refused(
            node.at("intx_packing_format"), f"is {packing}: bytes as a library packed them for one processor", plain
        )
    element = node.word("weight_dtype", "torch.dtype", "int8", tuple(CANONICAL_BITS))
    mapping = node.word(f"{prefix}mapping_type", "MappingType", _SYMMETRIC[0], (*_SYMMETRIC, _ASYMMETRIC))
    key = "intx_choose_qparams_algorithm"
    # Where null stands for the algorithm, the zero points came from a caller, and nothing says that they are 0.
    chosen = node.fields.get(key, key) is not None
    weights = sharing.of_weight(node, f"{prefix}granularity", default)
    return _ref(element, weights, symmetric=chosen and mapping in _SYMMETRIC, activation=activation)


def _float8_weight_only(node: Node) -> Form:
    element = node.word("weight_dtype", "torch.dtype", FLOATS[0], FLOATS)
    return _ref(element, sharing.of_weight(node, "granularity", BY_ROW)), ""


def _float8_dynamic(node: Node) -> Form:
    packing = node.word("packing_format", "Float8PackingFormat", "PLAIN")
    if packing != "PLAIN":
        raise refused(node.at("packing_format"), f"is {packing}: half of the weights are left out", "PLAIN")
    inputs, weights = sharing.of_both(node, "PerTensor")
    element = node.word("weight_dtype", "torch.dtype", FLOATS[0], FLOATS)
    element_of_x = node.word("activation_dtype", "torch.dtype", FLOATS[0], FLOATS)
    bounds = [key for key in ("activation_value_lb", "activation_value_ub") if node.fields.get(key) is not None]
    if bounds:
        return _ref(element, weights), f"{node.at(bounds[0])}: scales of x are kept within bounds, {_KEPT}"
    return _ref(element, weights, activation=sharing.permission(element_of_x, inputs, node)), ""


_READERS: dict[str, Callable[[Node], Form]] = {
    "Int8WeightOnlyConfig": _int8_weight_only,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "IntxWeightOnlyConfig": _intx_weight_only,
    "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
    "Float8WeightOnlyConfig": _float8_weight_only,
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
}


def _check_layout(node: Node, expected: str) -> None:
    """Check a field of older versions, which had a meaning in version 1 of the class only."""
    if node.fields.get("layout") is None:
        return
    layout = read_node(node.fields["layout"], node.at("layout"))
    if layout.kind != expected:
        raise refused(layout.where, f"is {layout.kind}: codes in another order", expected)


def _ref(element: str, shared: Sharing, *, symmetric: bool = True, activation: str = "none") -> SchemeRef:
    params: dict[str, Json] = {"element": element, "activation": activation, **shared}
    if element not in FLOATS:
        params["symmetric"] = symmetric
    return SchemeRef("torchao", tuple(sorted(params.items())))
