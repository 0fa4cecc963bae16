"""
What torchao writes about each tensor into `__metadata__` of a safetensors file, held against configuration and tensors.

`{"_type": "Int8Tensor", "_data": {"block_size": [1, 64], …}, "_tensor_data_names": ["qdata", "scale"]}` under the name
that the weight has in the model: torchao builds an object of the class that it names. Here it is evidence only: nothing
is looked up by what it says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from quantplug.errors import ConfigError
from quantplug.jsonio import get_list_of_str, get_mapping, get_str, parse_json
from quantplug.spec import PerBlock, PerGroup, PerTensor
from quantplug_torchao.nodes import refused
from quantplug_torchao.parameters import FLOATS
from quantplug_torchao.refusals import TENSOR_CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug.spec import Granularity
    from quantplug_torchao.scheme import TorchaoScheme

_WEIGHT = "weight"
_PLAIN = "Tensor"
_INT8, _INTX, _FLOAT8 = "Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"
_ACTIVATION = {_INT8: "act_quant_kwargs", _INTX: "activation_quantization", _FLOAT8: "act_quant_kwargs"}
"""The classes that are read, and where each says what becomes of x."""
_DATA_NAMES = frozenset({"qdata", "scale", "zero_point"})
_LARGEST = 10_000
"""Most values in the description of one tensor."""


@dataclass(frozen=True, slots=True)
class _Described:
    """The description of one tensor: its class, its plain attributes, and the names of the tensors it consists of."""

    kind: str
    data: Mapping[str, Json]
    parts: tuple[str, ...]


def check(
    scheme: TorchaoScheme, described: Mapping[str, str], stored: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """
    Check one layer.

    Args:
        scheme: what the configuration says about it.
        described: the descriptions of its tensors, by suffix.
        stored: the shapes of its tensors, by suffix.
        where: the path of the layer.

    Raises:
        ConfigError: `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-CFG-FIELD`, or as `parse_json`.
    """
    for suffix, text in described.items():
        place = f"{where}.{suffix}: __metadata__"
        try:
            tensor = _read(text)
        except ConfigError as error:
            raise ConfigError(error.code, place, error.what, expected=error.expected, fix=error.fix) from error
        if tensor.kind != _PLAIN and tensor.kind not in _ACTIVATION:
            reason = TENSOR_CLASSES.get(tensor.kind, "not a class that this reader knows")
            expected = f"{', '.join(_ACTIVATION)} or {_PLAIN}"
            raise refused(place, f"is of class {tensor.kind}: {reason}", expected)
        if suffix == _WEIGHT:
            _check_weight(scheme, tensor, stored, place)
        elif tensor.kind != _PLAIN:
            raise refused(place, f"{suffix} is of class {tensor.kind}", "nothing quantized but weights")


@lru_cache(maxsize=64)
def _read(text: str) -> _Described:
    """Read a description; nearly all layers of a file have one of few texts."""
    value = parse_json(text.encode(), "", max_values=_LARGEST)
    if not isinstance(value, dict):
        raise ConfigError("QP-CFG-FIELD", "", "is no JSON object", expected="an object with _type and _data")
    kind = get_str(value, "_type", "")
    if kind == _PLAIN:
        return _Described(kind, {}, ())
    return _Described(kind, get_mapping(value, "_data", ""), get_list_of_str(value, "_tensor_data_names", ""))


def _check_weight(scheme: TorchaoScheme, tensor: _Described, stored: Mapping[str, tuple[int, ...]], place: str) -> None:
    further = sorted(set(tensor.parts) - _DATA_NAMES)
    if further:
        what = f"the weight has {', '.join(further)} besides codes, scales and zero points"
        raise refused(place, what, "nothing that x is multiplied by, or scaled with, before it meets the weight")
    parts = {_WEIGHT} if tensor.kind == _PLAIN else {f"_{_WEIGHT}_{part}" for part in tensor.parts}
    found = stored.keys() & (scheme.suffixes | {_WEIGHT})
    if found != parts:
        _contradict(
            place,
            f"class {tensor.kind}, of {', '.join(sorted(parts)) or 'nothing'}",
            f"the tensors that are stored ({', '.join(sorted(found)) or 'none'})",
        )
    if tensor.kind == _PLAIN:
        return
    fitting = [_FLOAT8] if scheme.element in FLOATS else [_INTX] if scheme.element != "int8" else [_INT8, _INTX]
    if tensor.kind not in fitting:
        _contradict(place, f"class {tensor.kind}", f"{' or '.join(fitting)} for {scheme.describe()}")
    if tensor.kind == _INTX:
        target = tensor.data.get("target_dtype")
        name = target.get("_data") if isinstance(target, dict) else target
        if name != scheme.element:
            _contradict(place, f"codes of type {name!r}", f"{scheme.element} as in the configuration")
    _check_block(scheme.granularity, tensor.data.get("block_size"), stored.get("_weight_qdata", ()), place)
    if scheme.activation is not None and tensor.data.get(_ACTIVATION[tensor.kind]) is None:
        _contradict(place, "nothing about x", f"{scheme.describe()} as in the configuration")


def _check_block(granularity: Granularity, said: Json, size: tuple[int, ...], place: str) -> None:
    """Check the shape of what shares a scale; a scale of all weights is also spelled as no block at all."""
    block = [1, *size[1:]]
    match granularity:
        case PerTensor():
            block = list(size)
        case PerGroup(size=group):
            block = [1, group]
        case PerBlock(n=n, k=k):
            block = [n, k]
    if said != block and not (said in ([], None) and isinstance(granularity, PerTensor)):
        _contradict(place, f"block_size {said}", f"{block} as in the configuration, for codes {list(size)}")


def _contradict(place: str, what: str, expected: str) -> NoReturn:
    raise ConfigError(
        "QP-CFG-CONTRADICTION", place, f"says {what}", expected=expected,
        fix="config.json and the tensors come from different models, or one of them was changed; ask the maker.",
    )  # fmt: skip
