"""
The arguments of one quantized operand, as `weights`, `input_activations` and `kv_cache_scheme` spell them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_int, get_str
from quantplug.spec import ActivationSpec, ElementType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json

_READ = frozenset({
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "scale_dtype",
})  # fmt: skip
_BOOKKEEPING = frozenset({"observer", "observer_kwargs", "zp_dtype"})
"""How scales were found, and the dtype of zero points, which the tensors show."""
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_GROUPED = ("group", "tensor_group")
_ORDERS = {"group": "group", "dynamic": "group", "weight": "weight", "static": "weight"}
_LARGEST_GROUP = 1 << 20
_SHARED: dict[str, Literal["tensor", "token", "group"]] = {
    "tensor": "tensor", "token": "token", "group": "group", "tensor_group": "group",
}  # fmt: skip
_SCALE_DTYPES = {
    "": "float32", "float32": "float32", "bfloat16": "float32", "float16": "float32", "uint8": "float8_e8m0fnu",
    "float8_e8m0fnu": "float8_e8m0fnu", "float8_e4m3fn": "float8_e4m3fn",
}  # fmt: skip
"""What dynamic scales are rounded to; the dtype of x, which is what they are computed in, is no rounding."""


@dataclass(frozen=True, slots=True)
class Args:
    """
    What is said about one operand, defaults filled in.

    Attributes:
        bits: width of one code.
        kind: "int" or "float".
        symmetric: whether there are no zero points.
        strategy: which values share a scale.
        group_size: inputs per scale for the strategies of groups, else 0.
        block: rows and inputs per scale for the strategy "block", else (0, 0).
        dynamic: whether scales are computed at run time; "local" where only those of groups are.
        actorder: "none", "group" or "weight".
        scale_dtype: torch name of what scales are rounded to, "" where nothing is said.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    dynamic: bool | Literal["local"]
    actorder: str
    scale_dtype: str


def read_args(fields: Mapping[str, Json], where: str) -> Args:
    """
    Read the arguments of one operand; a null is as good as an absent key.

    Args:
        fields: the object.
        where: where it stands.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, or `QP-CFG-CONTRADICTION` for fields that exclude each other.
    """
    stated = {key: value for key, value in fields.items() if value is not None}
    unknown = sorted(stated.keys() - _READ - _BOOKKEEPING)
    if unknown:
        raise ConfigError(
            "QP-CFG-UNKNOWN", f"{where}.{unknown[0]}", "is not known to this reader, and may change what tensors mean",
            expected=", ".join(sorted(_READ)),
        )  # fmt: skip
    size = get_int(stated, "group_size", f"{where}.group_size", default=-1, minimum=-1, maximum=_LARGEST_GROUP)
    block = _block(stated, where)
    strategy = _lower(stated, "strategy", where, _STRATEGIES, _inferred(stated, size))
    _check_sizes(strategy, size, block, where)
    dynamic = _dynamic(stated, where)
    if dynamic == "local" and strategy != "tensor_group":
        raise _contradiction(f"{where}.dynamic", f"is 'local' with strategy {strategy!r}", "strategy 'tensor_group'")
    if strategy == "token" and not dynamic:
        raise _contradiction(
            f"{where}.dynamic", "is false with strategy 'token'", "true: rows of x are not known ahead"
        )
    return Args(
        bits=get_int(stated, "num_bits", f"{where}.num_bits", default=8, minimum=1, maximum=32),
        kind=_lower(stated, "type", where, ("int", "float"), "int"),
        symmetric=get_bool(stated, "symmetric", f"{where}.symmetric", default=True),
        strategy=strategy,
        group_size=size if strategy in _GROUPED else 0,
        block=block,
        dynamic=dynamic,
        actorder=_order(stated, strategy, where),
        scale_dtype=get_str(stated, "scale_dtype", f"{where}.scale_dtype", default="").removeprefix("torch."),
    )


def activation_of(args: Args, where: str) -> ActivationSpec:
    """
    Return the permission that arguments about activations, or about a cache, give.

    Raises:
        ConfigError: `QP-CFG-REFUSED` for what the vocabulary has no word for.
    """
    if args.strategy not in _SHARED:
        raise _refused(f"{where}.strategy", f"activations per {args.strategy!r} are not read", ", ".join(_SHARED))
    if args.strategy == "group" and not args.dynamic:
        raise _refused(f"{where}.dynamic", "is false for groups of inputs: stored scales are one per tensor", "true")
    nested = args.strategy == "tensor_group"
    if nested and args.dynamic != "local":
        raise _refused(
            f"{where}.dynamic", "is not 'local' for groups under a stored global scale", "'local', as NVFP4 has it"
        )
    if args.kind == "float" and args.bits in (4, 8):
        element = ElementType.FLOAT8_E4M3FN if args.bits == 8 else ElementType.FLOAT4_E2M1FN
    elif args.kind == "int" and args.bits in (4, 8):
        element = ElementType.integer(args.bits, signed=args.symmetric)
    else:
        raise _refused(
            f"{where}.num_bits", f"activations of type {args.kind} with {args.bits} bits are not read", "4, 8"
        )
    if args.kind == "float" and not args.symmetric:
        raise _contradiction(f"{where}.symmetric", "is false for floating-point numbers", "true")
    if args.scale_dtype not in _SCALE_DTYPES:
        raise _refused(
            f"{where}.scale_dtype",
            f"scales in {args.scale_dtype!r} are not read",
            ", ".join(filter(None, _SCALE_DTYPES)),
        )
    return ActivationSpec(
        element,
        _SHARED[args.strategy],
        dynamic=bool(args.dynamic),
        group_size=args.group_size,
        scale_dtype="float8_e4m3fn" if nested else _SCALE_DTYPES[args.scale_dtype],
        global_scale=nested,
    )


def _inferred(stated: Mapping[str, Json], size: int) -> str:
    """Return the strategy that goes without saying: as the format's own reader has it, it follows from the groups."""
    if "group_size" not in stated:
        return "tensor"
    return "channel" if size == -1 else "group"


def _lower(stated: Mapping[str, Json], key: str, where: str, choices: tuple[str, ...], default: str) -> str:
    """Return a text field in lower case, as the format's own reader takes it."""
    value = stated.get(key)
    lowered = {**stated, key: value.lower()} if isinstance(value, str) else stated
    return get_str(lowered, key, f"{where}.{key}", default=default, choices=choices)


def _block(stated: Mapping[str, Json], where: str) -> tuple[int, int]:
    """Return `block_structure`, a list of two sizes or (in old files) a text such as "128x128"; (0, 0) when absent."""
    value = stated.get("block_structure")
    if value is None:
        return 0, 0
    sizes: list[Json] = list(value) if isinstance(value, list) else []
    if isinstance(value, str):
        sizes = [int(part) if part.isascii() and part.isdigit() else part for part in value.split("x")]
    match sizes:
        case [int(n), int(k)] if type(n) is int and type(k) is int and min(n, k) > 0 and max(n, k) <= _LARGEST_GROUP:
            return n, k
    raise ConfigError(
        "QP-CFG-FIELD",
        f"{where}.block_structure",
        f"is {value!r:.60}" if isinstance(value, list) else f"is {describe_json(value)}",
        expected=f"two sizes from 1 to {_LARGEST_GROUP}, rows and inputs",
    )


def _check_sizes(strategy: str, size: int, block: tuple[int, int], where: str) -> None:
    if (strategy in _GROUPED) != (size > 0):
        raise _contradiction(
            f"{where}.group_size", f"is {size if size != -1 else 'absent'} with strategy {strategy!r}",
            "a size with the strategies 'group' and 'tensor_group' only",
        )  # fmt: skip
    if (strategy == "block") != (block != (0, 0)):
        said = f"{block[0]} x {block[1]}" if block != (0, 0) else "absent"
        raise _contradiction(
            f"{where}.block_structure", f"is {said} with strategy {strategy!r}", "sizes with the strategy 'block' only"
        )


def _dynamic(stated: Mapping[str, Json], where: str) -> bool | Literal["local"]:
    value = stated.get("dynamic", False)
    if isinstance(value, str) and value.lower() == "local":
        return "local"
    return get_bool(stated, "dynamic", f"{where}.dynamic", default=False)


def _order(stated: Mapping[str, Json], strategy: str, where: str) -> str:
    """Return what `actorder` means; true is an old spelling of "group"."""
    place, value = f"{where}.actorder", stated.get("actorder", False)
    if value is False:
        return "none"
    text = value.lower() if isinstance(value, str) else "group" if value is True else ""
    if text not in _ORDERS:
        raise ConfigError(
            "QP-CFG-FIELD",
            place,
            f"actorder is {describe_json(value)}",
            expected=f"one of {', '.join(_ORDERS)}, or null",
        )
    if _ORDERS[text] == "group" and strategy != "group":
        raise _contradiction(place, f"orders groups, and the strategy is {strategy!r}", "strategy 'group'")
    return _ORDERS[text]


def _contradiction(where: str, what: str, expected: str) -> ConfigError:
    return ConfigError("QP-CFG-CONTRADICTION", where, what, expected=expected, fix="Correct the one that is wrong.")


def _refused(where: str, what: str, expected: str) -> ConfigError:
    return ConfigError("QP-CFG-REFUSED", where, what, expected=expected)
