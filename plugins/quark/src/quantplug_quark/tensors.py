"""
How Quark describes the quantization of one tensor, and what that means here: a scheme for a weight, the text of a
permission for inputs.

The layouts are those of Quark's safetensors export (`quark/torch/export/nn/modules/realquantizer.py`,
`quark/torch/utils/pack.py`). Schemes are named, never imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.activations import spell_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_int, get_str
from quantplug.skip import SchemeRef
from quantplug.spec import ActivationSpec, ElementType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json

_FLOATS = {"fp8_e4m3": ElementType.FLOAT8_E4M3FN, "fp8_e5m2": ElementType.FLOAT8_E5M2}
_WHOLE = ("bfloat16", "float16", "float32")
"""`dtype` values of a tensor that is not quantized."""
_MX_GROUP = 32
_E8M0 = "e8m0"
_IN_AWQ_ORDER = "its codes are packed in AWQ's order under names that are not AWQ's"
_REFUSED = {
    "uint4": _IN_AWQ_ORDER,
    "int4": _IN_AWQ_ORDER,
    "int3": "eight codes share three bytes in an order of Quark's own",
    "int2": "Quark writes a byte or a word for each code, depending on its version",
    "uint2": "Quark writes a byte or a word for each code, depending on its version",
    "uint8": "its zero points are those of unsigned codes, which no scheme here stores under this name",
    "fp6_e3m2": "no element type here has six bits",
    "fp6_e2m3": "no element type here has six bits",
    "fp8_e5m3": "no element type here has five bits of exponent and three of mantissa",
    "mx": "its scales lie between its codes, in an old form that Quark itself no longer exports",
    "mx6": "Quark itself cannot export it",
    "mx9": "Quark itself cannot export it",
    "bfp16": "Quark itself cannot export it",
}
"""`dtype` values that are recognised and not read, with the reason."""

_KEYS = frozenset({
    "dtype", "qscheme", "ch_axis", "group_size", "block_size", "symmetric", "is_dynamic", "is_scale_quant",
    "scale_format", "mx_element_dtype", "zero_point_type", "scale_type",
    # how the numbers were found, or which of several equal ones is taken
    "observer_cls", "round_method", "scale_calculation_mode", "percentile", "qat_spec", "enable_buffer_reuse",
    "max_input_numel", "moving_average",
})  # fmt: skip
_FIX = "Use a copy of the model in another format, or convert the dense model (quantplug convert)."


def quantized(value: Json) -> bool:
    """Return whether a tensor's description says that it is quantized at all."""
    return bool(value) and not (isinstance(value, dict) and value.get("dtype") in _WHOLE)


def weight_scheme(value: Json, activation: str, where: str) -> SchemeRef:
    """
    Return the scheme of a weight.

    Args:
        value: its description, an object.
        activation: the permission that goes with it, as `inputs` returns it.
        where: where the description stands.

    Raises:
        ConfigError: `QP-CFG-REFUSED` with the reason for what is known and not read, `QP-CFG-UNKNOWN`, `QP-CFG-FIELD`.
    """
    fields = _fields(value, where)
    dtype = get_str(fields, "dtype", where)
    if get_bool(fields, "is_dynamic", f"{where}.is_dynamic", default=False):
        raise _refused(
            f"{where}.is_dynamic", "the weight is quantized while the model runs, so that it is stored dense"
        )
    qscheme = get_str(
        fields, "qscheme", where, choices=("per_tensor", "per_channel", "per_group", "per_block")
    )  # fmt: skip
    powers = fields.get("scale_format") == _E8M0
    if dtype in _FLOATS:
        if powers:
            return _microscaled("mxfp8", fields, qscheme, activation, where)
        return _scheme("fp8", element=_FLOATS[dtype].value, activation=activation, **_sharing(fields, qscheme, where))
    if dtype == "fp4" and powers:
        return _microscaled("mxfp4", fields, qscheme, activation, where)
    if dtype == "int8":
        if qscheme not in ("per_tensor", "per_channel"):
            raise _refused(f"{where}.qscheme", f"int8 {qscheme}: the weight is stored transposed")
        # Quark stores zero points beside all integers; symmetric ones are 0.
        return _scheme("int8", symmetric=False, activation=activation, **_sharing(fields, qscheme, where))
    raise _refused(f"{where}.dtype", _reason(fields, dtype))


def _reason(fields: Mapping[str, Json], dtype: str) -> str:
    if dtype == "fp4":
        scales = describe_json(fields.get("scale_format"))
        return f"fp4 with scales of format {scales}: only powers of two ('{_E8M0}') are certain"
    return f"{dtype}: {_REFUSED.get(dtype, 'not a type that this reader knows')}"


def _sharing(fields: Mapping[str, Json], qscheme: str, where: str) -> dict[str, Json]:
    """Return the parameters that say how scales are shared."""
    match qscheme:
        case "per_tensor":
            return {"strategy": "tensor"}
        case "per_channel":
            axis = fields.get("ch_axis")
            if axis not in (0, -2):
                raise _refused(f"{where}.ch_axis", f"channels along axis {describe_json(axis)}, where rows are axis 0")
            return {"strategy": "channel"}
        case "per_group":
            return {"strategy": "group", "group_size": get_int(fields, "group_size", where, minimum=1)}
        case _:
            n, k = _block(fields, where)
            return {"strategy": "block", "block_n": n, "block_k": k}


def _block(fields: Mapping[str, Json], where: str) -> tuple[int, int]:
    """Return rows and inputs of a block."""
    size = fields.get("block_size")
    match size:
        case [int(n), int(k)] if n > 0 and k > 0:
            return n, k
    raise ConfigError(
        "QP-CFG-FIELD", f"{where}.block_size", f"is {describe_json(size)}", expected="[rows, inputs], both above 0"
    )


def _microscaled(name: str, fields: Mapping[str, Json], qscheme: str, activation: str, where: str) -> SchemeRef:
    """Return the scheme of a weight whose scales are powers of two, one for 32 inputs."""
    if qscheme == "per_group":
        rows, size = 1, get_int(fields, "group_size", where)
    elif qscheme == "per_block":
        rows, size = _block(fields, where)
    else:
        rows, size = 0, 0
    if (rows, size) != (1, _MX_GROUP):
        raise _refused(
            f"{where}.qscheme", f"{qscheme} with scales that are powers of two, {rows} rows by {size} inputs"
        )
    if name == "mxfp8":
        if fields.get("dtype") != "fp8_e4m3":
            raise _refused(f"{where}.dtype", f"{fields['dtype']} with scales that are powers of two")
        return _scheme(name, scale_name="weight_scale", activation=activation)
    return _scheme(name, weight_name="weight", scale_name="weight_scale", activation=activation)


def inputs(value: Json, where: str) -> tuple[str, str]:
    """
    Return the permission to quantize inputs, and a note where it cannot be made use of.

    A permission of a type that no kernel here could use is left out: x then keeps its precision, which is allowed.

    Args:
        value: the description, or null.
        where: where it stands.

    Raises:
        ConfigError: `QP-CFG-REFUSED` when stored scales would be left over, `QP-CFG-UNKNOWN`, `QP-CFG-FIELD`.
    """
    if not quantized(value):
        return "none", ""
    fields = _fields(value, where)
    dtype = get_str(fields, "dtype", where)
    dynamic = get_bool(fields, "is_dynamic", f"{where}.is_dynamic", default=False)
    spec = _permission(fields, dtype, where, dynamic=dynamic)
    if spec is not None:
        return spell_activation(spec), ""
    qscheme = describe_json(fields.get("qscheme"))
    if not dynamic:
        raise _refused(where, f"stored scales of inputs of type {dtype}, {qscheme}, which no scheme here reads")
    return "none", f"{where}: inputs of type {dtype}, {qscheme}, keep their precision; no kernel here has that type"


def _permission(fields: Mapping[str, Json], dtype: str, where: str, *, dynamic: bool) -> ActivationSpec | None:
    qscheme = get_str(fields, "qscheme", where, default="per_tensor")
    powers = fields.get("scale_format") == _E8M0
    element = _FLOATS.get(dtype)
    if dtype == "int8":
        # A stored zero point goes with every stored scale of integers, and unsigned codes are the ones that have one.
        symmetric = get_bool(fields, "symmetric", f"{where}.symmetric", default=True)
        element = ElementType.INT8 if dynamic and symmetric else ElementType.UINT8
    if dtype == "fp4" and powers:
        element = ElementType.FLOAT4_E2M1FN
    if element is None:
        return None
    if powers:
        size = get_int(fields, "group_size", where) if qscheme == "per_group" else 0
        if size != _MX_GROUP or not dynamic:
            return None
        return ActivationSpec(element, "group", dynamic=True, group_size=size, scale_dtype="float8_e8m0fnu")
    match qscheme:
        case "per_tensor":
            return ActivationSpec(element, "tensor", dynamic=dynamic)
        case "per_channel" if dynamic:
            return ActivationSpec(element, "token", dynamic=True)
        case "per_group" if dynamic:
            size = get_int(fields, "group_size", where, minimum=1)
            return ActivationSpec(element, "group", dynamic=True, group_size=size)
    return None


def kv_cache(value: Json, where: str) -> ActivationSpec:
    """
    Return what cached keys and values are: FP8 with one stored scale.

    Raises:
        ConfigError: `QP-CFG-REFUSED` for any other form.
    """
    fields = _fields(value, where)
    dtype = get_str(fields, "dtype", where)
    if dtype not in _FLOATS or fields.get("qscheme") != "per_tensor" or fields.get("is_dynamic") is True:
        qscheme = describe_json(fields.get("qscheme"))
        raise _refused(where, f"a cache of type {dtype}, {qscheme}; only FP8 with one stored scale is read")
    return ActivationSpec(_FLOATS[dtype], "tensor", dynamic=False)


def _fields(value: Json, where: str) -> Mapping[str, Json]:
    if isinstance(value, list):
        raise _refused(where, "the tensor is quantized in two steps, one after the other")
    if not isinstance(value, dict):
        raise ConfigError("QP-CFG-FIELD", where, f"is {describe_json(value)}", expected="an object, or null")
    fields = value
    unknown = sorted(key for key in fields.keys() - _KEYS if fields[key] not in (None, False))
    if unknown:
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            f"{where}.{unknown[0]}",
            f"{unknown[0]} is {describe_json(fields[unknown[0]])}, which may change what the numbers mean",
            expected="a key that this reader knows",
            fix="A newer quantplug may know it; otherwise ask the maker of the checkpoint what it means.",
        )
    if fields.get("is_scale_quant"):
        raise _refused(where, "the scales are quantized once more")
    return fields


def _scheme(name: str, **params: Json) -> SchemeRef:
    return SchemeRef(name, tuple(sorted(params.items())))


def _refused(where: str, what: str) -> ConfigError:
    return ConfigError(
        "QP-CFG-REFUSED", where, what, expected="FP8, INT8 per tensor or channel, MXFP8 or MXFP4", fix=_FIX
    )
