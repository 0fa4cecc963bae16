"""
From a group's format and arguments to the scheme that reads its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import spell_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.skip import SchemeRef
from quantplug_compressed_tensors.args import activation_of
from quantplug_compressed_tensors.parameters import BITS, STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.jsonio import Json
    from quantplug_compressed_tensors.args import Args

PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
MIXED = "mixed-precision"
READ = (PACK, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP8)
"""Formats that a group may have."""

_UNREAD = {
    "dense": "its weights are stored unquantized beside scales that they are yet to be quantized with",
    "fakequant": "its weights are stored unquantized beside scales that they are yet to be quantized with",
    "mxfp6-pack-quantized": "the project has no 6-bit floating-point codes",
    "marlin-24": "its weights are 2:4 sparse and laid out for one GPU kernel; no current writer has it",
    "sparse-24-bitmask": "its weights are 2:4 sparse, stored as values and a bit mask; no current writer has it",
    "sparse-bitmask": "its weights are sparse, stored as values and a bit mask; no current writer has it",
}
_PLAIN = (*STRATEGIES, "block")
_MX_SIZE, _NV_SIZE = 32, 16
_MX_SCALES = ("", "uint8", "float8_e8m0fnu")


def check_format(value: Json, where: str, *, whole: bool) -> str:
    """
    Return a format that is read; `MIXED`, and formats that only groups replace, where it is that of the whole file.

    Args:
        value: the field `format`.
        where: where it stands.
        whole: whether it is that of the whole file rather than a group's own.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-REFUSED` with the reason, `QP-CFG-UNKNOWN` for a name never heard of.
    """
    if not isinstance(value, str):
        raise ConfigError("QP-CFG-FIELD", where, f"format is {describe_json(value)}", expected="a text")
    if value in READ or (whole and value == MIXED):
        return value
    if value == MIXED:
        raise ConfigError("QP-CFG-FIELD", where, f"{MIXED!r} is no format of one group", expected=" or ".join(READ))
    if value in _UNREAD:
        raise ConfigError(
            "QP-CFG-REFUSED",
            where,
            f"the format {value!r} is not read: {_UNREAD[value]}",
            expected=" or ".join(READ),
            fix="Use a compressed copy of the model, or convert the dense model (quantplug convert).",
        )
    raise ConfigError("QP-CFG-UNKNOWN", where, f"format {value!r} is not known", expected=" or ".join(READ))


def infer_format(weights: Args, inputs: Args | None) -> str:
    """Return the format that goes without saying, in the order in which compressed_tensors 0.20 tries them."""
    if weights.kind == "float" and weights.bits == 4 and weights.group_size == _MX_SIZE:
        return MXFP4
    if (weights.kind, weights.bits, weights.group_size, weights.scale_dtype) == ("float", 8, _MX_SIZE, "uint8"):
        return MXFP8
    if weights.kind == "float" and weights.bits == 4 and weights.group_size == _NV_SIZE:
        return NVFP4
    if weights.kind == "int":
        return PACK if inputs is None else INT
    return NAIVE if inputs is None else FLOAT


def scheme_ref(form: str, weights: Args, inputs: Args | None, where: str) -> SchemeRef:
    """
    Return the scheme that reads tensors of that format and those arguments; what is its default is left out.

    Args:
        form: one of `READ`.
        weights: arguments of the weights.
        inputs: arguments of the activations, None where they stay as they are.
        where: the group.

    Raises:
        ConfigError: `QP-CFG-CONTRADICTION` where arguments do not belong to the format, `QP-CFG-REFUSED` for widths and
            activations that nothing here reads.
    """
    if weights.dynamic:
        raise ConfigError(
            "QP-CFG-CONTRADICTION", f"{where}.weights.dynamic", "is true: scales of stored weights are stored, too",
            expected="false",
        )  # fmt: skip
    if weights.kind == "float" and not weights.symmetric:
        raise ConfigError(
            "QP-CFG-CONTRADICTION", f"{where}.weights.symmetric", "is false for floating-point numbers", expected="true"
        )
    name, params = _BUILDERS[form](form, weights, f"{where}.weights")
    if inputs is not None:
        params["activation"] = spell_activation(activation_of(inputs, f"{where}.input_activations"))
    return SchemeRef(name, tuple(sorted(params.items())))


def _packed(form: str, weights: Args, where: str) -> tuple[str, dict[str, Json]]:
    _need(weights.kind == "int", form, where, f"type {weights.kind!r}", "type 'int'")
    _need(weights.strategy in STRATEGIES, form, where, f"strategy {weights.strategy!r}", " or ".join(STRATEGIES))
    _need_bits(weights, BITS, where)
    params = {"bits": weights.bits, **_shared(weights)}
    if weights.strategy == "group":
        params.pop("strategy")  # a size says as much
    if weights.actorder != "none":
        params["actorder"] = weights.actorder
    return "ct-pack", params


def _plain(form: str, weights: Args, where: str) -> tuple[str, dict[str, Json]]:
    """Return the scheme of codes that are stored one by one."""
    _need(weights.strategy in _PLAIN, form, where, f"strategy {weights.strategy!r}", " or ".join(_PLAIN))
    if weights.kind == "int":
        _need(form != FLOAT, form, where, "type 'int'", "type 'float'")
        _need_bits(weights, (4, 8), where)
        return "int8", ({} if weights.bits == 8 else {"bits": weights.bits}) | _shared(weights)
    _need(form != INT, form, where, "type 'float'", "type 'int'")
    _need(weights.bits == 8, form, where, f"{weights.bits} bits", "8 bits")
    return "fp8", _shared(weights)


def _shared(weights: Args) -> dict[str, Json]:
    """Return how scales are shared and whether there are zero points, without what is a default everywhere."""
    params: dict[str, Json] = {} if weights.strategy == "channel" else {"strategy": weights.strategy}
    if weights.strategy == "group":
        params["group_size"] = weights.group_size
    if weights.strategy == "block":
        params |= {"block_n": weights.block[0], "block_k": weights.block[1]}
    if not weights.symmetric:
        params["symmetric"] = False
    return params


def _mx(form: str, weights: Args, where: str) -> tuple[str, dict[str, Json]]:
    bits = 4 if form == MXFP4 else 8
    found = (weights.kind, weights.bits, weights.strategy, weights.group_size)
    _need(found == ("float", bits, "group", _MX_SIZE), form, where, *_told(found, bits, "group", _MX_SIZE))
    _need(weights.scale_dtype in _MX_SCALES, form, where, f"scales in {weights.scale_dtype}", "scales in uint8")
    return ("mxfp4" if bits == 4 else "mxfp8"), {}


def _nvfp4(form: str, weights: Args, where: str) -> tuple[str, dict[str, Json]]:
    found = (weights.kind, weights.bits, weights.strategy, weights.group_size)
    _need(found == ("float", 4, "tensor_group", _NV_SIZE), form, where, *_told(found, 4, "tensor_group", _NV_SIZE))
    _need(
        weights.scale_dtype in ("", "float8_e4m3fn"), form, where, f"scales in {weights.scale_dtype}", "float8_e4m3fn"
    )
    return "nvfp4", {}


_BUILDERS: dict[str, Callable[[str, Args, str], tuple[str, dict[str, Json]]]] = {
    PACK: _packed, INT: _plain, FLOAT: _plain, NAIVE: _plain, MXFP4: _mx, MXFP8: _mx, NVFP4: _nvfp4,
}  # fmt: skip


def _told(found: tuple[str, int, str, int], bits: int, strategy: str, size: int) -> tuple[str, str]:
    kind, width, shared, count = found
    is_ = f"type {kind!r}, {width} bits, strategy {shared!r}, group_size {count or 'absent'}"
    return is_, f"type 'float', {bits} bits, strategy {strategy!r}, group_size {size}"


def _need(ok: bool, form: str, where: str, what: str, expected: str) -> None:
    if not ok:
        raise ConfigError(
            "QP-CFG-CONTRADICTION", where, f"has {what}, and the format is {form!r}", expected=expected,
            fix="Find out which one describes the tensors, and correct the other.",
        )  # fmt: skip


def _need_bits(weights: Args, known: tuple[int, ...], where: str) -> None:
    if weights.bits not in known:
        raise ConfigError(
            "QP-CFG-REFUSED",
            f"{where}.num_bits",
            f"integer codes of {weights.bits} bits are not read in this format",
            expected=f"{', '.join(map(str, known))} bits",
            fix="Use a copy of the model in another width, or convert the dense model (quantplug convert).",
        )
