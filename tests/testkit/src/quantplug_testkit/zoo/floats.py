"""
Kernels that read floating-point codes, blocks or scales of scales wrongly.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantplug.spec import ElementType, PerBlock
from quantplug_testkit.zoo.broken import Misread

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.weight import Prepared, Weight


class SwappedFloat4Codes(Misread):
    """Takes the high nibble of a byte first, where the format stores the first code in the low one."""

    def misread(self, weight: Weight) -> Weight:
        """Swap each pair of 4-bit codes."""
        if weight.spec.element is not ElementType.FLOAT4_E2M1FN:
            return weight
        end = weight.in_features // 2 * 2
        pairs = weight.codes[:, :end].reshape(weight.out_features, -1, 2).flip(-1)
        return replace(weight, codes=torch.cat([pairs.flatten(1), weight.codes[:, end:]], dim=1))


class Float4AsInteger(Misread):
    """Takes 4-bit floating-point codes for integers with a sign bit."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return sign and magnitude, times the scale."""
        return torch.cat([_as_integers(weight).to(dtype) for weight in self.unprepare(prepared)])


class DroppedSignBit(Misread):
    """Reads three of the four bits of a code."""

    def misread(self, weight: Weight) -> Weight:
        """Clear the sign."""
        if weight.spec.element is ElementType.FLOAT4_E2M1FN:
            weight.codes.bitwise_and_(7)
        return weight


class UnsignedZeroForNegative(Misread):
    """Reads bytes of the type without infinities and with one zero as those of the usual type: twice the value."""

    def misread(self, weight: Weight) -> Weight:
        """Reinterpret float8_e4m3fnuz codes."""
        if weight.spec.element is not ElementType.FLOAT8_E4M3FNUZ:
            return weight
        return replace(weight, codes=weight.codes.view(torch.float8_e4m3fn))


class FlushedSubnormalCodes(Misread):
    """Takes the subnormals of an 8-bit type for zero."""

    caught_by = ("test_every_weight_is_used_at_its_place",)

    def misread(self, weight: Weight) -> Weight:
        """Clear codes whose exponent field is 0."""
        if weight.codes.dtype != torch.float8_e4m3fn:
            return weight
        octets = weight.codes.view(torch.uint8)
        cleared = torch.where(octets & 0x78 == 0, 0, octets)
        return replace(weight, codes=cleared.view(torch.float8_e4m3fn))


class ShiftedExponentByte(Misread):
    """Makes a scale of an exponent byte by shifting it into place, which makes 0 of 2^-127."""

    caught_by = ("test_small_and_large_inputs_are_within_the_bound",)

    def misread(self, weight: Weight) -> Weight:
        """Build float32 from its bits."""
        if weight.scales.dtype != torch.float8_e8m0fnu:
            return weight
        bits = weight.scales.view(torch.uint8).to(torch.int32) << 23
        return replace(weight, scales=bits.view(torch.float32))


class ExponentByteOffByOne(Misread):
    """Counts exponents from 128 instead of 127."""

    def misread(self, weight: Weight) -> Weight:
        """Halve all scales that are powers of two."""
        if weight.scales.dtype != torch.float8_e8m0fnu:
            return weight
        return replace(weight, scales=weight.scales.to(torch.float32) / 2)


class BlockRowsOffByOne(Misread):
    """Starts each block of rows one row too late."""

    def misread(self, weight: Weight) -> Weight:
        """Give the first row of each block the scales of the block before."""
        return _with_blocks_from(weight, lambda row: max(row - 1, 0))


class BlocksCountedThroughTheLayer(Misread):
    """Counts blocks of rows from the first row of a fused layer, not from the first row of each segment."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Start blocks where those of the segments before have ended."""
        start, parts = 0, []
        for weight in self.unprepare(prepared):
            parts.append(_with_blocks_from(weight, partial(int.__add__, start)).dequantize(dtype))
            start += weight.out_features
        return torch.cat(parts)


class TransposedBlocks(Misread):
    """Reads the scales of blocks in the order of the other axis."""

    def misread(self, weight: Weight) -> Weight:
        """Take them as if they lay `[K blocks, N blocks]`."""
        if not isinstance(weight.spec.granularity, PerBlock):
            return weight
        return replace(weight, scales=weight.scales.t().reshape(weight.scales.shape))


class GlobalScaleDropped(Misread):
    """Forgets the factor of all scales."""

    def misread(self, weight: Weight) -> Weight:
        """Take 1 for it."""
        return replace(weight, global_scale=None)


class GlobalScaleTwice(Misread):
    """Folds the factor of all scales into them and applies it again."""

    def misread(self, weight: Weight) -> Weight:
        """Square it."""
        return weight if weight.global_scale is None else replace(weight, global_scale=weight.global_scale.square())


class GlobalScaleReciprocal(Misread):
    """Divides by the factor of all scales, as some files store it."""

    def misread(self, weight: Weight) -> Weight:
        """Turn it round."""
        return weight if weight.global_scale is None else replace(weight, global_scale=1 / weight.global_scale)


class OneScaleForFusedSegments(Misread):
    """Uses the largest of the scales that the shards of a fused layer have for all of them, without requantizing."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Take the maximum where there is one scale each."""
        segments = self.unprepare(prepared)
        if any(weight.scales.numel() != 1 for weight in segments):
            return super(Misread, self).dequantize(prepared, dtype)
        largest = torch.stack([weight.scales.float() for weight in segments]).amax(0)
        return torch.cat([replace(weight, scales=largest).dequantize(dtype) for weight in segments])


class OneGlobalScaleForFusedSegments(Misread):
    """Uses the global scale of the first shard of a fused layer for all of them."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Take the first."""
        segments = self.unprepare(prepared)
        first = segments[0].global_scale
        read = [weight if weight.global_scale is None else replace(weight, global_scale=first) for weight in segments]
        return torch.cat([weight.dequantize(dtype) for weight in read])


def _as_integers(weight: Weight) -> torch.Tensor:
    if weight.spec.element is not ElementType.FLOAT4_E2M1FN:
        return weight.dequantize()
    size = (weight.codes & 7).float()
    return torch.where(weight.codes > 7, -size, size) * weight.scale_values()[:, weight.group_index()]


def _with_blocks_from(weight: Weight, counted: Callable[[int], int]) -> Weight:
    """The weight with scales for blocks of single rows, each taken from where it is counted to be."""
    match weight.spec.granularity:
        case PerBlock(n=n, k=k):
            first, last = counted(0) // n, weight.scales.shape[0] - 1
            rows = [min(counted(row) // n - first, last) for row in range(weight.out_features)]
            spec = replace(weight.spec, granularity=PerBlock(1, k))
            zeros = None if weight.zeros is None else weight.zeros[rows]
            return replace(weight, scales=weight.scales[rows], zeros=zeros, spec=spec)
    return weight
