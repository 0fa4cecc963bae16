"""
Which products with a quantized x the kernel takes, what it refuses, and what they cost: known without a GPU and Triton.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.spec import ElementType, PerBlock, PerTensor, scale_shape
from quantplug_triton.fit import LAUNCH_US, refuse_place, refuse_weight, scale_bytes
from quantplug_triton.grids import GRIDS
from quantplug_triton.slots import group_sizes

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import ActivationSpec, LinearProblem, SegmentSpec

NATIVE = ("8.9", "9.0")
"""
Compute capabilities on which FP8 is multiplied as it is. Elsewhere codes are multiplied in bfloat16, which holds each
of them: older GPUs have no FP8, and what the sums of newer ones lose, nobody has derived here.
"""

_FOR_FLOATS = (ElementType.FLOAT8_E4M3FN, ElementType.FLOAT8_E5M2, ElementType.FLOAT4_E2M1FN, ElementType.INT4)
_FOR_INTEGERS = (ElementType.INT8, ElementType.INT4)
"""Codes of weights that the types of x's codes hold, too."""

_CHUNKS = (128, 64, 32)
"""Inputs of one product of a tile: no more than a short accumulator may add up, no fewer than 8-bit products take."""

_LONGEST_SUM = (2**31 - 1) // 128**2
"""So many products of 8-bit integers have a sum that int32 holds, whatever they are."""

# One H100, see README.md: bytes of a stream of weights and products per microsecond, by how much of a chunk's
# time goes into its scales; 32 inputs are few for that, and codes of 4 bits are decoded, too.
_BYTES_PER_US = {"one scale": 2.4e6, "chunks": 2.4e6, "short chunks": 1.25e6, "short chunks of 4 bits": 3.6e5}
_PRODUCTS_PER_US = {"one scale": 4.5e8, "chunks": 3.4e8, "short chunks": 7e7, "short chunks of 4 bits": 4e7}
_LIFTED = 1 / 3
"""What is left of these products where FP8 is lifted, as `triton.wna16` multiplies; not measured."""


class Chunks(NamedTuple):
    """
    How inputs are cut: every input stays in its place, and each chunk lies within a group of the weight and one of x.

    Attributes:
        size: inputs of a chunk.
        per_group: chunks of a group of the weight.
        fields: codes per byte; a byte holds codes of chunks that follow each other.
    """

    size: int
    per_group: int
    fields: int

    def slots(self, inputs: int) -> int:
        """Return K filled up to whole bytes' worth of chunks."""
        unit = self.size * self.fields
        return -(-inputs // unit) * unit


def quantized_verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = refuse_place(problem, platform) or refuse_weight(problem)
    if refusal is not None:
        return refusal
    if problem.activation is None:
        return Rejected("activation", "the file permits none", "triton.wna16 leaves x as it is")
    chunks = chunks_of(problem)
    refusal = _refuse_activation(problem.activation) or _refuse_weight_for(problem.activation, problem)
    if refusal is not None:
        return refusal
    if chunks is None:
        return _refuse_groups(problem.activation, problem)
    floating, k = problem.activation.element.floating, problem.in_features
    # A platform without a number may be any.
    native = platform.arch in ("", *NATIVE)
    held, filled = bytes_held(problem, chunks), chunks.slots(k)
    pace = _pace(problem, chunks)
    products = _PRODUCTS_PER_US[pace] * (1 if native or not floating else _LIFTED)
    return Accepted(
        Cost(LAUNCH_US + held / _BYTES_PER_US[pace], problem.out_features * k / products),
        casts=(Cast("accumulator", "float22_e8m13"),) if floating and native else (),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=(f"K is filled up to {filled}",) if filled != k else (),
        quantizes_x=True,
    )


def shared_by(activation: ActivationSpec) -> str:
    """Return what shares a scale of x: "tensor", "token", "group", or "power" for groups and powers of two."""
    return "power" if activation.scale_dtype == "float8_e8m0fnu" else activation.granularity


def chunks_of(problem: LinearProblem) -> Chunks | None:
    """Return how inputs are cut, in the widest chunks of those that fill K up the least; None where none fit."""
    activation, weight = problem.activation, problem.segments[0].weight
    sizes = group_sizes(weight.granularity, problem.in_features)
    size = activation.group_size if activation is not None and activation.granularity == "group" else 0
    fitting = [
        Chunks(chunk, -(-sizes[0] // chunk), 8 // held_bits(weight.element))
        for chunk in _CHUNKS
        if size in (0, chunk) and (len(sizes) == 1 or sizes[0] % chunk == 0)
    ]
    return min(fitting, key=lambda chunks: chunks.slots(problem.in_features), default=None)


def _pace(problem: LinearProblem, chunks: Chunks) -> str:
    """Return which of the rates above holds."""
    activation, weight = problem.activation, problem.segments[0].weight
    grouped = activation is not None and activation.granularity == "group"
    if not grouped and len(group_sizes(weight.granularity, problem.in_features)) == 1:
        return "one scale"
    if chunks.size > _CHUNKS[-1]:
        return "chunks"
    return "short chunks" if held_bits(weight.element) == 8 else "short chunks of 4 bits"


def held_bits(element: ElementType) -> int:
    """Return the width in which a code is held."""
    return 4 if element.bits == 4 else 8


def parts(segments: tuple[SegmentSpec, ...], *, together: bool) -> list[int]:
    """
    Return how many segments share a product, in order.

    Args:
        segments: of a problem whose segments share one contract.
        together: whether x has the same codes for all of them.
    """
    blocks = isinstance(segments[0].weight.granularity, PerBlock)
    return [1] * len(segments) if blocks or not together else [len(segments)]


def bytes_held(problem: LinearProblem, chunks: Chunks) -> int:
    """Return the bytes of what `prepare` yields; where scales of x are stored, as if each segment had its own."""
    weight, k = problem.segments[0].weight, problem.in_features
    static = problem.activation is not None and not problem.activation.dynamic
    codes = problem.out_features * chunks.slots(k) * held_bits(weight.element) // 8
    sizes = [segment.out_features for segment in problem.segments]
    spread = isinstance(weight.granularity, PerTensor) and len(sizes) > 1
    scales = sum(sizes) if spread else sum(prod(scale_shape(weight.granularity, size, k)) for size in sizes)
    return codes + scales * scale_bytes(weight) + 4 * len(sizes) * static


def _refuse_activation(activation: ActivationSpec) -> Rejected | None:
    x = f"x as {activation.describe()}"
    if activation.element not in GRIDS:
        return Rejected("activation", x, f"one of {', '.join(GRIDS)}")
    if activation.global_scale or activation.scale_dtype not in ("float32", "float8_e8m0fnu"):
        return Rejected("activation", f"{x}, scales in {activation.scale_dtype}", "float32 or float8_e8m0fnu")
    if not activation.dynamic and activation.granularity != "tensor":
        return Rejected("activation", x, "stored scales for all of x")
    if activation.granularity == "group" and activation.group_size not in _CHUNKS:
        return Rejected("activation", x, f"groups of {', '.join(map(str, _CHUNKS))}")
    if activation.scale_dtype == "float8_e8m0fnu" and (
        activation.granularity != "group" or activation.element is ElementType.INT8
    ):
        return Rejected("activation", f"{x}, scales in float8_e8m0fnu", "groups of floating-point numbers")
    return None


def _refuse_weight_for(activation: ActivationSpec, problem: LinearProblem) -> Rejected | None:
    weight, k = problem.segments[0].weight, problem.in_features
    known = _FOR_FLOATS if activation.element.floating else _FOR_INTEGERS
    if weight.element not in known:
        return Rejected("element", f"codes are {weight.element}, and x is {activation.element}", " or ".join(known))
    if weight.act_order:
        return Rejected("act_order", "g_idx gives inputs an order of their own", "weights in the order of inputs")
    if weight.global_scale:
        return Rejected("dtype", "a global scale multiplies the scales", "scales without one")
    if not activation.element.floating and k > _LONGEST_SUM:
        return Rejected("shape", f"in_features {k} may overflow sums in int32", f"at most {_LONGEST_SUM}")
    return None


def _refuse_groups(activation: ActivationSpec, problem: LinearProblem) -> Rejected:
    weight = problem.segments[0].weight
    least = activation.group_size if activation.granularity == "group" else _CHUNKS[-1]
    return Rejected("granularity", f"{weight.describe()}, x {activation.describe()}", f"groups of whole {least} inputs")
