"""
What auto-round stores for a layer, told from its fields: the scheme by name, with its parameters.

`data_type` says which numbers, `packing_format` in which tensors. Each pair that is read here was seen in a file of
auto-round's; all others are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_int, get_str
from quantplug.skip import SchemeRef
from quantplug_auto_round.activations import read_activation
from quantplug_auto_round.keys import FIX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.jsonio import Json

WHOLE_BITS = 16
"""From this width on a layer is not quantized."""
DEFAULT_PACKING = "auto_round:auto_gptq"
_BITS = (2, 3, 4, 8)
_GPTQ = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_gptq": "gptq",
    "gptq": "gptq",
    "auto": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
"""`packing_format` -> `checkpoint_format`: GPTQ's packing with zero points less one, or as they are."""
_AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq")
_FLOAT8 = ("auto_round:fp8", "auto_round:fp8_static")
_LLM_COMPRESSOR = ("auto_round:llm_compressor",)
_OTHERS = {
    "llm_compressor": "the layout of compressed-tensors",
    "llm_compressor_nvfp4_e5m3": "NVFP4 with scales of another type",
    "fp8": "FP8 weights",
    "fp8_static": "FP8 weights and activations",
    "fp8_block": "FP8 weights",
    "mx_fp": "MXFP weights",
    "mx_fp_rceil": "MXFP weights",
    "mx_int": "MXINT weights",
    "nv_fp": "NVFP4 weights",
    "nv_fp4_with_static_gs": "NVFP4 weights",
    "mlx": "MLX's layout",
    "fake": "dense weights, quantized and put back",
}
_FMT = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_MX_GROUP, _NV_GROUP = 32, 16


def scheme_of(fields: Mapping[str, Json], origin: Callable[[str], str]) -> SchemeRef | None:
    """
    Return the scheme of a layer, None for one that is left whole.

    Args:
        fields: the fields of the whole file, with what a layer changes merged in.
        origin: where a key stands.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`.
    """
    if get_int(fields, "bits", origin("bits"), minimum=1) >= WHOLE_BITS:
        return None
    kind = get_str(fields, "data_type", origin("data_type"), default="int")
    readers = {"int": _integers, "fp": _float8, "mx_fp": _mx, "nv_fp": _nvfp4}
    if kind not in readers:
        raise ConfigError(
            "QP-CFG-REFUSED",
            origin("data_type"),
            f"data_type is {describe_json(kind)}",
            expected=" or ".join(map(repr, readers)),
            fix=FIX,
        )
    name, params = readers[kind](fields, origin)
    return SchemeRef(name, tuple(sorted(params.items())))


def _integers(fields: Mapping[str, Json], origin: Callable[[str], str]) -> tuple[str, dict[str, Json]]:
    packing = _packing(fields, origin, (*_GPTQ, *_AWQ), "int")
    act_bits = WHOLE_BITS if fields.get("act_bits") is None else get_int(fields, "act_bits", origin("act_bits"))
    if act_bits < WHOLE_BITS:
        raise ConfigError(
            "QP-CFG-REFUSED",
            origin("act_bits"),
            f"activations are quantized to {act_bits} bits",
            expected="weights only, for integers in GPTQ's or AWQ's layout",
            fix=FIX,
        )
    sym = get_bool(fields, "sym", origin("sym"), default=True)
    size = get_int(fields, "group_size", origin("group_size"), minimum=-1)
    if packing in _AWQ:
        bits = get_int(fields, "bits", origin("bits"))
        return "awq", {"bits": bits, "group_size": size, "version": "gemm", "zero_point": not sym}
    return "gptq", {
        "bits": get_int(fields, "bits", origin("bits"), choices=_BITS),
        "group_size": size,
        "sym": sym,
        "desc_act": False,
        "checkpoint_format": _GPTQ[packing],
    }


def _float8(fields: Mapping[str, Json], origin: Callable[[str], str]) -> tuple[str, dict[str, Json]]:
    if fields.get("packing_format") is not None:  # files with FP8 weights alone have none
        _packing(fields, origin, _FLOAT8, "fp")
    _exactly(fields, origin, "bits", 8)
    _symmetric(fields, origin)
    fmt = get_str(fields, "fmt", origin("fmt"), default="e4m3", choices=tuple(_FMT))
    params: dict[str, Json] = {"element": _FMT[fmt], "activation": read_activation(fields, origin)}
    size = fields.get("group_size")
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        n, k = size
        return "fp8", params | {"strategy": "block", "block_n": n, "block_k": k, "scale_name": "weight_scale_inv"}
    if type(size) is not int or size not in (-1, 0):
        raise ConfigError(
            "QP-CFG-FIELD",
            origin("group_size"),
            "group_size is missing" if "group_size" not in fields else f"group_size is {describe_json(size)}",
            expected="0 (one scale), -1 (one per output) or two integers above 0 (blocks), for FP8",
        )
    return "fp8", params | {"strategy": "tensor" if size == 0 else "channel"}


def _mx(fields: Mapping[str, Json], origin: Callable[[str], str]) -> tuple[str, dict[str, Json]]:
    _packing(fields, origin, _LLM_COMPRESSOR, "mx_fp")
    bits = get_int(fields, "bits", origin("bits"), choices=(4, 8))
    _exactly(fields, origin, "group_size", _MX_GROUP)
    _symmetric(fields, origin)
    return f"mxfp{bits}", {"activation": read_activation(fields, origin)}


def _nvfp4(fields: Mapping[str, Json], origin: Callable[[str], str]) -> tuple[str, dict[str, Json]]:
    _packing(fields, origin, _LLM_COMPRESSOR, "nv_fp")
    _exactly(fields, origin, "bits", 4)
    _exactly(fields, origin, "group_size", _NV_GROUP)
    _symmetric(fields, origin)
    return "nvfp4", {"activation": read_activation(fields, origin)}


def _packing(fields: Mapping[str, Json], origin: Callable[[str], str], read: tuple[str, ...], kind: str) -> str:
    """Return `packing_format`, which must be one that is read for that kind of numbers."""
    packing = get_str(fields, "packing_format", origin("packing_format"), default=DEFAULT_PACKING)
    if packing in read:
        return packing
    expected = " or ".join(map(repr, read))
    if packing in (*_GPTQ, *_AWQ):
        what = "integers"
    elif packing.removeprefix("auto_round:") in _OTHERS:
        what = _OTHERS[packing.removeprefix("auto_round:")]
    else:
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            origin("packing_format"),
            f"packing_format {packing!r} is not a known layout",
            expected=expected,
            fix=FIX,
        )
    raise ConfigError(
        "QP-CFG-REFUSED",
        origin("data_type" if "data_type" in fields else "packing_format"),
        f"packing_format {packing!r} means {what}, while data_type is {kind!r}",
        expected=f"{expected} for these numbers",
        fix=FIX,
    )


def _exactly(fields: Mapping[str, Json], origin: Callable[[str], str], key: str, value: int) -> None:
    get_int(fields, key, origin(key), choices=(value,))


def _symmetric(fields: Mapping[str, Json], origin: Callable[[str], str]) -> None:
    if not get_bool(fields, "sym", origin("sym"), default=True):
        raise ConfigError("QP-CFG-FIELD", origin("sym"), "sym is false", expected="true, for floating-point codes")
