"""
The vocabulary: what a quantized weight is, and what a kernel is asked to do with it.

Everything here is frozen, hashable and constructible without torch. Letters used throughout the project:
M tokens (rows of x), N out_features, K in_features, G groups, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Literal


class ElementType(StrEnum):
    """
    The type of one stored code.

    `uintN` codes come with zero points and lie in `0 … 2^N - 1`; `intN` codes are signed, have no zero point and lie
    in `-2^(N-1) … 2^(N-1) - 1`. Floating-point codes have no zero point either; they are spelled as torch spells them.
    All of them take one byte per code in the canonical layout, whatever their width is.
    """

    UINT2 = "uint2"
    UINT3 = "uint3"
    UINT4 = "uint4"
    UINT8 = "uint8"
    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT8 = "int8"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT8_E4M3FNUZ = "float8_e4m3fnuz"
    FLOAT8_E5M2FNUZ = "float8_e5m2fnuz"
    FLOAT4_E2M1FN = "float4_e2m1fn"

    @property
    def bits(self) -> int:
        """Width of one code in bits."""
        return int("".join(filter(str.isdigit, self.value.partition("_")[0])))

    @property
    def floating(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.value.startswith("float")

    @property
    def signed(self) -> bool:
        """Whether codes are signed, which here also means: without zero points."""
        return not self.value.startswith("uint")

    @staticmethod
    def integer(bits: int, *, signed: bool) -> ElementType:
        """Return the integer type of that width; raises `ValueError` when the project has none."""
        return ElementType(f"{'int' if signed else 'uint'}{bits}")


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole weight: scales `[1, 1]`."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output row: scales `[N, 1]`."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per row and `size` consecutive inputs: scales `[N, ceil(K / size)]`; the last group may be short."""

    size: int


@dataclass(frozen=True, slots=True)
class PerBlock:
    """
    One scale per tile of `n` rows and `k` inputs: scales `[ceil(N / n), ceil(K / k)]`.

    Tiles at the edges may be ragged. Tiles are counted from the first row of each segment.
    """

    n: int
    k: int


Granularity = PerTensor | PerChannel | PerGroup | PerBlock

SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e8m0fnu": 1, "float8_e4m3fn": 1}
"""Bytes of a scale by torch name of its dtype."""


def scale_shape(granularity: Granularity, out_features: int, in_features: int) -> tuple[int, int]:
    """Return the shape of the scales of an `[N, K]` weight (with a `g_idx`, G may differ from it)."""
    match granularity:
        case PerTensor():
            return 1, 1
        case PerChannel():
            return out_features, 1
        case PerGroup(size=size):
            return out_features, -(-in_features // size)
        case PerBlock(n=n, k=k):
            return -(-out_features // n), -(-in_features // k)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """
    The numeric contract of one weight: `value = (code - zero) * scale [* global_scale]`.

    Attributes:
        element: type of the codes.
        granularity: how scales (and zeros) are shared.
        scale_dtype: torch name of the stored scale dtype: "float16", "bfloat16", "float32", "float8_e8m0fnu" (MX
            formats: a power of two) or "float8_e4m3fn" (NVFP4).
        act_order: whether a `g_idx` may assign inputs to groups in any order.
        global_scale: whether one float32 factor multiplies all scales.
    """

    element: ElementType
    granularity: Granularity
    scale_dtype: str = "float16"
    act_order: bool = False
    global_scale: bool = False

    @property
    def zero_points(self) -> bool:
        """Whether the weight carries zero points (unsigned codes always do)."""
        return not self.element.signed

    def describe(self) -> str:
        """Return a short human form such as `uint4 group 64 act-order`."""
        match self.granularity:
            case PerTensor():
                shared = "per tensor"
            case PerChannel():
                shared = "per channel"
            case PerGroup(size=size):
                shared = f"group {size}"
            case PerBlock(n=n, k=k):
                shared = f"block {n}x{k}"
        return f"{self.element} {shared}" + (" act-order" if self.act_order else "")


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """
    The file's permission to quantize activations; a kernel that makes use of it declares so.

    Attributes:
        element: type of the activation's codes (int8, float8_e4m3fn, …; uint8 where it is not symmetric).
        granularity: "tensor", "token" or "group".
        dynamic: whether scales are computed from x at run time (else they are stored, see `ActivationParams`).
        group_size: inputs per scale when granularity is "group", else 0.
        scale_dtype: torch name of the dtype that dynamic scales are rounded to ("float32": not at all;
            "float8_e8m0fnu" for MX formats, "float8_e4m3fn" for NVFP4).
        global_scale: whether one stored float32 factor multiplies all scales (NVFP4).
    """

    element: ElementType
    granularity: Literal["tensor", "token", "group"]
    dynamic: bool
    group_size: int = 0
    scale_dtype: str = "float32"
    global_scale: bool = False

    def describe(self) -> str:
        """Return a short human form such as `int8 per token, dynamic`."""
        shared = f"group {self.group_size}" if self.granularity == "group" else f"per {self.granularity}"
        return f"{self.element} {shared}, {'dynamic' if self.dynamic else 'static'}"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The logical size of one linear layer (or one shard of a fused one): y `[M, N]` = x `[M, K]` W^T + b."""

    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """
    One tensor that a format stores for one layer.

    Attributes:
        suffix: name after the module path ("qweight").
        shape: stored shape.
        dtypes: torch dtype names the format allows, preferred first.
        required: whether a checkpoint without it is incomplete.
        packed_axis: axis along which several codes share one element, or None.
        packed_factor: codes per element along `packed_axis`, as (codes, elements) so that 32 codes in 3 words is exact.
        output_axis: axis that splits under column parallelism, or None.
        input_axis: axis that splits under row parallelism, or None.
        other_shapes: further shapes in which writers store the same values in the same order (a scale `[]` as `[1]`).
    """

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    required: bool = True
    packed_axis: int | None = None
    packed_factor: tuple[int, int] = (1, 1)
    output_axis: int | None = None
    input_axis: int | None = None
    other_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """One shard of a possibly fused linear layer: its rows and its own numeric contract."""

    out_features: int
    weight: WeightSpec


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """
    What a kernel is asked to run.

    Attributes:
        in_features: K.
        segments: one per shard, in output order; an unfused layer has exactly one.
        dtype: torch name of the activation and output dtype ("bfloat16", "float16", "float32").
        bias: whether a bias `[N]` is added.
        activation: the file's permission to quantize x, or None for weight-only.
    """

    in_features: int
    segments: tuple[SegmentSpec, ...]
    dtype: str
    bias: bool = False
    activation: ActivationSpec | None = None

    @property
    def out_features(self) -> int:
        """N, summed over segments."""
        return sum(segment.out_features for segment in self.segments)

    @property
    def uniform(self) -> bool:
        """Whether all segments share one numeric contract."""
        return len({segment.weight for segment in self.segments}) == 1

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales, zero points and g_idx at their stored width, without the few of a global scale."""
        total = 0
        for segment in self.segments:
            weight, n, k = segment.weight, segment.out_features, self.in_features
            # A scale dtype that nobody knows is for kernels to refuse.
            per_scale = SCALE_BYTES.get(weight.scale_dtype, 4) + weight.zero_points
            total += 4 * k if weight.act_order else 0
            total += n * k * weight.element.bits // 8 + prod(scale_shape(weight.granularity, n, k)) * per_scale
        return total
