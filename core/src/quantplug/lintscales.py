"""
The stored scales of a checkpoint, read and looked at one tensor at a time; in a deep look, codes of weights, too.

What is wrong, and where the bounds come from:

- NaN and infinite scales: no format has them. A scale of 0 or below: wrong for what divides (stored scales of inputs,
  of a cache, and of all scales). A negative scale of weights: wrong where codes are floating-point, whose range is
  symmetric, so that a scale is a largest magnitude over a constant; integers have one code more on the negative side,
  and some writers use it by a negative scale.
- 0 among the scales of a weight: what it scales is 0. All of them 0: the layer computes nothing.
- Subnormal in its own dtype (float16, bfloat16, float32): its precision is lost, and many processors take it for 0.
- So large that the largest code times it is beyond the activation dtype: the dequantized weight may be infinite. Beyond
  float16, whatever the activation dtype: no published model has weights that large, and engines convert to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.errors import QuantplugError
from quantplug.findings import Finding
from quantplug.lintrules import SHOWN
from quantplug.reader import TensorReader
from quantplug.spec import ElementType, LinearShape, PerBlock, PerGroup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantplug.checkpoint import Checkpoint
    from quantplug.findings import Severity
    from quantplug.lintrules import Decided
    from quantplug.load import Progress
    from quantplug.plan import Segment
    from quantplug.scheme import LinearScheme
    from quantplug.schemes import SchemeCache

_INPUT = "input"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMMON = "float16"
_E8M0 = "float8_e8m0fnu"
_EXPONENTS = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7C}
"""Float8 dtype -> magnitude of the first byte that is no finite number."""
_MAGNITUDE = 0x7F


@dataclass(slots=True)
class Values:
    """What was read, and what was found in it."""

    findings: list[Finding] = field(default_factory=list)
    scales: int = 0
    codes: int = 0


class _Stored(NamedTuple):
    """
    One scale tensor to be looked at.

    Attributes:
        name: tensor name.
        signed: whether a scale below 0 has a meaning.
        divides: whether 0 has none.
        largest: the largest magnitude of what it scales, factors of all scales included; 0 when that is not known.
        dtype: torch name that its bytes are to be read as, "" for the stored one.
    """

    name: str
    signed: bool
    divides: bool
    largest: float
    dtype: str = ""


def check_values(
    checkpoint: Checkpoint,
    decided: Sequence[Decided],
    schemes: SchemeCache,
    *,
    dtype: str,
    deep: bool,
    progress: Progress | None = None,
) -> Values:
    """
    Read every stored scale, and in a deep look every 8-bit float code, and return what is wrong with them.

    One tensor is held at a time.

    Args:
        checkpoint: the headers.
        decided: the modules and their plans.
        schemes: where the schemes of the plans were built.
        dtype: torch name of the activation dtype.
        deep: whether codes are read.
        progress: told how many bytes of how many are read.
    """
    result = Values()
    faults = _Faults()
    segments = [part for item in decided if item.layer is not None for part in item.layer.segments if not part.quantize]
    codes = [name for part in segments for name in _float_codes(part, checkpoint)] if deep else []
    handed = [_Stored(name, signed=False, divides=True, largest=0) for name in _cache_scales(checkpoint)]
    with TensorReader(checkpoint) as reader:
        todo = [*handed, *(one for part in segments for one in _scales(part, schemes, checkpoint, reader, result))]
        total = sum(checkpoint.tensors[name].nbytes for name in (*(one.name for one in todo), *codes))
        done = 0
        for one in todo:
            _look(one, reader.read(one.name), dtype, faults)
            done += checkpoint.tensors[one.name].nbytes
            if progress is not None:
                progress("lint", done, total)
        for name in codes:
            _look_at_codes(name, reader.read(name), faults)
            done += checkpoint.tensors[name].nbytes
            if progress is not None:
                progress("lint", done, total)
    result.scales, result.codes = len(todo), len(codes)
    result.findings += faults.findings()
    return result


class _Faults:
    """Faults gathered by kind, so that a thousand tensors with the same one are one finding."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, Severity, str, str], list[tuple[str, str]]] = {}

    def add(self, code: str, severity: Severity, kind: str, fix: str, name: str, detail: str) -> None:
        """Add one tensor's fault."""
        self._kinds.setdefault((code, severity, kind, fix), []).append((name, detail))

    def findings(self) -> Iterator[Finding]:
        """Yield one finding for each kind, with the details of the first tensor."""
        for (code, severity, kind, fix), found in self._kinds.items():
            name, detail = found[0]
            more = f" (and {len(found) - 1:,} more tensors)" if len(found) > 1 else ""
            names = tuple(name for name, _ in found[:SHOWN])
            yield Finding(code, severity, name, f"{detail}{kind}{more}", fix, names, len(found))


def _cache_scales(checkpoint: Checkpoint) -> Iterator[str]:
    from quantplug.kvcache import is_kv_scale

    for name, header in checkpoint.tensors.items():
        if is_kv_scale(name) and "scale" in name.rpartition(".")[2] and header.dtype in _names(_FLOATS):
            yield name


def _scales(
    segment: Segment, schemes: SchemeCache, checkpoint: Checkpoint, reader: TensorReader, result: Values
) -> Iterator[_Stored]:
    """Yield the scale tensors of one segment: by their names, which say scale in every format."""
    scheme = schemes.get(segment.scheme, segment.name)
    spec = scheme.weight_spec()
    shared = [(suffix, name) for suffix, name in segment.tensors if "scale" in suffix or suffix == "scales"]
    single = {suffix for suffix, name in shared if prod(checkpoint.tensors[name].shape) == 1}
    inputs = {suffix for suffix, _ in shared if suffix.startswith(_INPUT)}
    factors = single - inputs if spec.global_scale else set()
    largest = _largest_code(spec.element)
    if factors:
        try:
            largest *= _factor(scheme, segment, reader)
        except QuantplugError as error:
            result.findings.append(Finding.of(error))
            largest = 0
    for suffix, name in shared:
        read_as = _E8M0 if checkpoint.tensors[name].dtype == "uint8" and spec.scale_dtype == _E8M0 else ""
        if suffix in inputs or suffix in factors or suffix in scheme.divisors:
            yield _Stored(name, signed=False, divides=True, largest=0, dtype=read_as)
        else:
            yield _Stored(name, signed=not spec.element.floating, divides=False, largest=largest, dtype=read_as)


def _largest_code(element: ElementType) -> float:
    """Return the largest magnitude that a code can stand for, its zero point taken away."""
    if element is ElementType.FLOAT4_E2M1FN:
        return 6.0
    if element.floating:
        return float(torch.finfo(getattr(torch, element.value)).max)
    return float(2 ** (element.bits - element.signed) - (not element.signed))


def _factor(scheme: LinearScheme, segment: Segment, reader: TensorReader) -> float:
    """
    Return what all scales of a segment are multiplied by, as its format means the stored number.

    Whether it is stored as such or as its reciprocal is the format's business, so the format decodes a layer of one
    group that has this number and nothing else.
    """
    granularity = scheme.weight_spec().granularity
    size = granularity.size if isinstance(granularity, PerGroup) else 1
    size = granularity.k if isinstance(granularity, PerBlock) else size
    shape = LinearShape(1, size)
    stored = dict(segment.tensors)
    tensors = {}
    for param in scheme.params(shape):
        if param.suffix in stored and prod(param.shape) == 1 and "scale" in param.suffix:
            tensor = reader.read(stored[param.suffix])
            if tensor.numel() == 1:
                tensors[param.suffix] = tensor.reshape(param.shape)
                continue
        tensors[param.suffix] = torch.zeros(param.shape, dtype=getattr(torch, param.dtypes[0]))
    factor = scheme.decode(tensors, shape, segment.name).global_scale
    return 1.0 if factor is None else float(factor)


def _look(one: _Stored, tensor: torch.Tensor, dtype: str, faults: _Faults) -> None:
    """Look at one scale tensor."""
    if tensor.numel() == 0:
        return
    if one.dtype:
        tensor = tensor.view(getattr(torch, one.dtype))
    values = tensor.to(torch.float32).reshape(-1)
    low, high = (float(value) for value in values.aminmax())
    if not (isfinite(low) and isfinite(high)):
        broken = ~values.isfinite()
        faults.add("QP-ST-SCALE", "error", "are NaN or infinite", _DAMAGED, one.name, _share(broken, values))
        return
    if low < 0 and not one.signed:
        what = "are negative" if not one.divides else "are negative, where x or a scale is divided by them"
        faults.add("QP-ST-SCALE", "error", what, _DAMAGED, one.name, _share(values < 0, values))
    if low <= 0 <= high:
        _look_at_zeros(one, values, faults)
    if tensor.dtype in _FLOATS and low < torch.finfo(tensor.dtype).tiny:
        _look_at_small(one, values, tensor.dtype, faults)
    _look_at_size(one, values.numel(), max(-low, high), dtype, faults)


def _look_at_zeros(one: _Stored, values: torch.Tensor, faults: _Faults) -> None:
    zero = values == 0
    if not bool(zero.any()):
        return
    share = _share(zero, values)
    if one.divides:
        faults.add("QP-ST-SCALE", "error", "are 0, where x or a scale is divided by them", _DAMAGED, one.name, share)
    elif bool(zero.all()):
        faults.add("QP-LINT-ZERO", "error", "are 0: the layer computes nothing", _DAMAGED, one.name, share)
    else:
        faults.add(
            "QP-LINT-ZERO", "note", "are 0: so is what they scale",
            "This is harmless where the original weights are 0, too.", one.name, share,
        )  # fmt: skip


def _look_at_small(one: _Stored, values: torch.Tensor, dtype: torch.dtype, faults: _Faults) -> None:
    small = (values != 0) & (values.abs() < torch.finfo(dtype).tiny)
    if not bool(small.any()):
        return
    held = str(dtype).removeprefix("torch.")
    faults.add(
        "QP-LINT-TINY", "warning", f"are subnormal in {held}",
        "Many processors take such numbers for 0; store these scales in a wider dtype.", one.name,
        _share(small, values),
    )  # fmt: skip


def _look_at_size(one: _Stored, count: int, largest: float, dtype: str, faults: _Faults) -> None:
    reach = largest * one.largest
    limits: tuple[tuple[str, Severity], ...] = ((dtype, "error"), (_COMMON, "warning"))
    for limit, severity in limits:
        bound = torch.finfo(getattr(torch, limit)).max
        if reach > bound:
            faults.add(
                "QP-LINT-HUGE",
                severity,
                f" makes weights of up to {reach:.3g}, beyond what {limit} holds ({bound:.3g})",
                "The scale was damaged, or belongs to another tensor; no published model has weights that large.",
                one.name,
                f"the largest of {count:,} scale(s), {largest:.3g},",
            )
            return


def _look_at_codes(name: str, tensor: torch.Tensor, faults: _Faults) -> None:
    """Look at one weight of 8-bit floats."""
    first = _EXPONENTS[str(tensor.dtype).removeprefix("torch.")]
    octets = tensor.view(torch.uint8).reshape(-1)
    wrong = (octets & _MAGNITUDE) >= first
    if bool(wrong.any()):
        faults.add("QP-LINT-CODE", "error", "are NaN or infinite", _DAMAGED, name, _share(wrong, octets, "codes"))


def _float_codes(segment: Segment, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the tensors of one segment that hold 8-bit float codes."""
    for suffix, name in segment.tensors:
        if "scale" not in suffix and checkpoint.tensors[name].dtype in _EXPONENTS:
            yield name


def _share(wrong: torch.Tensor, values: torch.Tensor, what: str = "scale(s)") -> str:
    """Return how many of how many, and where the first is."""
    first = int(wrong.nonzero()[0])
    return f"{int(wrong.sum()):,} of {values.numel():,} {what} (the first is number {first}) "


def _names(dtypes: Sequence[torch.dtype]) -> frozenset[str]:
    return frozenset(str(dtype).removeprefix("torch.") for dtype in dtypes)


_DAMAGED = "The file was damaged or quantized wrongly; download it again or ask its maker."
