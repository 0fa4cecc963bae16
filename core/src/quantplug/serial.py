"""
Plans as JSON and back: a closed set of dataclasses, tagged by name; no byte of a file ever names code.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

from quantplug.config import Field
from quantplug.errors import PlanError
from quantplug.expertrules import Ending, ExpertFiles, ExpertLayer
from quantplug.kernel import Accepted, Cast, Cost, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.plan import PLAN_VERSION, Candidate, Choice, Decision, KVCachePlan, LayerPlan, LeftTensors, Plan, Segment
from quantplug.platform import Platform
from quantplug.skip import Entry, EntryUse, SchemeRef
from quantplug.spec import (
    ActivationSpec,
    LinearProblem,
    LinearShape,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    SegmentSpec,
    WeightSpec,
)

if TYPE_CHECKING:
    from quantplug.jsonio import Json

_TAG = "is"
_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Plan, LayerPlan, Segment, Decision, Choice, Candidate, LeftTensors, KVCachePlan, Platform, Field, EntryUse,
        Entry, SchemeRef, Accepted, Rejected, Cost, Cast, LinearProblem, LinearShape, SegmentSpec, WeightSpec,
        ActivationSpec, PerTensor, PerChannel, PerGroup, PerBlock, MoEProblem, ExpertFunction, ExpertLayer, ExpertFiles,
        Ending,
    )
}  # fmt: skip


def to_json(value: object) -> Json:
    """Return plain JSON for a plan or any value within one; sets are sorted, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        body: dict[str, Json] = {_TAG: type(value).__name__}
        for item in dataclasses.fields(value):
            body[item.name] = to_json(getattr(value, item.name))
        return body
    if isinstance(value, Enum):
        return to_json(value.value)
    if isinstance(value, frozenset):
        return [to_json(item) for item in sorted(value)]
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def plain(value: object) -> Json:
    """Return plain JSON for any dataclass, without tags: for people and scripts that only read."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (tuple, list, frozenset)):
        return [plain(item) for item in value]
    return to_json(value)


def from_json(value: Json, where: str) -> Plan:
    """
    Return the plan that `to_json` wrote.

    Raises:
        PlanError: `QP-PLAN-JSON` naming the place, when anything is missing, extra or of the wrong type.
    """
    if isinstance(value, dict) and value.get("version") != PLAN_VERSION:
        raise _malformed(where, f"version {value.get('version')!r}", f"version {PLAN_VERSION}")
    return typing.cast("Plan", _read(value, Plan, where))


@cache
def _hints(cls: type) -> dict[str, Any]:
    # Json is opaque here: whatever plain values a configuration held come back as they were written.
    return typing.get_type_hints(cls, localns={"Json": object})


def _read(value: Json, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) or origin in (typing.Union, types.UnionType):
        return _read_union(value, hint, where)
    if origin is tuple or origin is frozenset:
        return _read_sequence(value, hint, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise _malformed(where, repr(value), f"one of {typing.get_args(hint)}")
        return value
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise _malformed(where, repr(value), f"one of {[member.value for member in hint]}") from None
    if hint is float and type(value) is int:
        return float(value)
    if hint in (bool, int, float, str) and type(value) is not hint:
        raise _malformed(where, repr(value)[:80], f"{hint.__name__}")
    return value


def _read_union(value: Json, hint: Any, where: str) -> Any:
    members: tuple[Any, ...] = typing.get_args(hint) or (hint,)
    classes: dict[str, type] = {member.__name__: member for member in members if isinstance(member, type)}
    classes = {name: cls for name, cls in classes.items() if dataclasses.is_dataclass(cls)}
    if isinstance(value, dict) and classes:
        name = value.get(_TAG)
        if not isinstance(name, str) or name not in classes or name not in _CLASSES:
            raise _malformed(where, f"{_TAG} {name!r}", f"one of {sorted(classes)}")
        cls = _CLASSES[name]
        hints = _hints(cls)
        unknown = set(value) ^ ({_TAG} | {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise _malformed(where, f"fields missing or unknown: {sorted(unknown)}", f"the fields of {name}")
        return cls(**{key: _read(item, hints[key], f"{where}.{key}") for key, item in value.items() if key != _TAG})
    if value is None and type(None) in members:
        return None
    plain = [member for member in members if member is not type(None) and not dataclasses.is_dataclass(member)]
    if not plain:
        raise _malformed(where, repr(value)[:80], f"an object, one of {sorted(classes)}")
    return _read(value, plain[0], where) if len(plain) == 1 else value


def _read_sequence(value: Json, hint: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise _malformed(where, repr(value)[:80], "a list")
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is frozenset:
        return frozenset(_read(item, arguments[0], f"{where}[{n}]") for n, item in enumerate(value))
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(item, arguments[0], f"{where}[{n}]") for n, item in enumerate(value))
    if len(value) != len(arguments):
        raise _malformed(where, f"{len(value)} items", f"{len(arguments)} items")
    return tuple(
        _read(item, hint, f"{where}[{n}]") for n, (item, hint) in enumerate(zip(value, arguments, strict=True))
    )


def _malformed(where: str, what: str, expected: str) -> PlanError:
    return PlanError("QP-PLAN-JSON", where, what, expected=expected, fix="Make the plan again with this version.")
