"""
Kernels that read the weights wrongly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerGroup
from quantplug_testkit.zoo.broken import Misread

if TYPE_CHECKING:
    from quantplug.weight import Prepared, Weight


class SwappedGroupIndex(Misread):
    """Two entries of g_idx have changed places."""

    def misread(self, weight: Weight) -> Weight:
        """Swap the first entry with the next one of another group."""
        if weight.g_idx is not None:
            other = int((weight.g_idx != weight.g_idx[0]).nonzero()[0])
            weight.g_idx[[0, other]] = weight.g_idx[[other, 0]]
        return weight


class IgnoredActOrder(Misread):
    """Assigns inputs to groups in order, whatever g_idx says."""

    def misread(self, weight: Weight) -> Weight:
        """Drop g_idx."""
        return replace(weight, g_idx=None)


class DoubledScales(Misread):
    """One scale in a hundred is twice what it should be."""

    def misread(self, weight: Weight) -> Weight:
        """Double every hundredth scale."""
        weight.scales.view(-1)[::100] *= 2
        return weight


class MissingPlusOne(Misread):
    """Takes stored zero points as they are where the format stores them less one."""

    def misread(self, weight: Weight) -> Weight:
        """Undo the addition of one, mask included."""
        if weight.zeros is None:
            return weight
        return replace(weight, zeros=(weight.zeros - 1) & ((1 << weight.spec.element.bits) - 1))


class MissingMask(Misread):
    """Adds one to stored zero points without dropping the carry, so that 0 becomes 2^bits."""

    caught_by = ("test_every_weight_is_used_at_its_place",)

    def misread(self, weight: Weight) -> Weight:
        """Read every zero point of 0 as one above the largest."""
        if weight.zeros is None or weight.spec.element.bits == 8:
            return weight
        return replace(weight, zeros=weight.zeros.masked_fill(weight.zeros == 0, 1 << weight.spec.element.bits))


class SwappedNibbles(Misread):
    """Takes the two codes of a byte in the wrong order, in one group."""

    def misread(self, weight: Weight) -> Weight:
        """Swap neighbours among the first 16 inputs."""
        end = min(16, weight.in_features // 2 * 2)
        pairs = weight.codes[:, :end].clone()
        weight.codes[:, 0:end:2], weight.codes[:, 1:end:2] = pairs[:, 1::2], pairs[:, 0::2]
        return weight


class SignedAsUnsigned(Misread):
    """Keeps the low bits of signed codes and forgets their sign."""

    def misread(self, weight: Weight) -> Weight:
        """Add 2^bits to every negative code."""
        if not weight.spec.element.signed:
            return weight
        levels = 1 << weight.spec.element.bits
        return replace(weight, codes=torch.where(weight.codes < 0, weight.codes.short() + levels, weight.codes))


class ShortGroupOffByOne(Misread):
    """Has a scale for each whole group only, and takes the last of them for the inputs left over."""

    def misread(self, weight: Weight) -> Weight:
        """Point the last, short group at the one before it."""
        match weight.spec.granularity:
            case PerGroup(size=size) if weight.in_features > size:
                whole = weight.in_features // size
                return replace(weight, g_idx=weight.group_index().clamp(max=whole - 1))
        return weight


class ZeroScaleIsOne(Misread):
    """Guards a division by taking 1 for a scale of 0."""

    def misread(self, weight: Weight) -> Weight:
        """Replace scales of 0."""
        return replace(weight, scales=weight.scales.masked_fill(weight.scales == 0, 1))


class UnsignedScales(Misread):
    """Holds scales without their sign."""

    def misread(self, weight: Weight) -> Weight:
        """Drop the sign."""
        return replace(weight, scales=weight.scales.abs())


class UndeclaredScaleCast(Misread):
    """Rounds scales to bfloat16 and does not say so."""

    def misread(self, weight: Weight) -> Weight:
        """Round the scales."""
        return replace(weight, scales=weight.scales.to(torch.bfloat16))


class UndeclaredWeightCast(Misread):
    """Rounds the dequantized weight to bfloat16 and does not say so."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Round on the way."""
        return torch.cat([weight.dequantize(torch.bfloat16) for weight in self.unprepare(prepared)]).to(dtype)


class SwappedSegments(Misread):
    """Puts the shards of a fused layer in the wrong order."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the last segment first."""
        return torch.cat([weight.dequantize(dtype) for weight in reversed(self.unprepare(prepared))])


class SharedPermutation(Misread):
    """Permutes x once for a fused layer, though each shard has its own order."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Use the first segment's g_idx for all that have one."""
        segments = self.unprepare(prepared)
        first = segments[0].g_idx
        return torch.cat(
            [
                (weight if weight.g_idx is None else replace(weight, g_idx=first)).dequantize(dtype)
                for weight in segments
            ]
        )


class DroppedTail(Misread):
    """Leaves out the last 32 inputs."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return values of 0 there."""
        values = super(Misread, self).dequantize(prepared, dtype)
        values[:, -32:] = 0
        return values


class DroppedOddInput(Misread):
    """Works on pairs of inputs, and loses the last one of an odd number."""

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return values of 0 for an input without a partner."""
        values = super(Misread, self).dequantize(prepared, dtype)
        values[:, values.shape[1] // 2 * 2 :] = 0
        return values
