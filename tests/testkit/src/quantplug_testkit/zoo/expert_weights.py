"""
Kernels for experts that read the right expert's weights wrongly, or another one's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerBlock
from quantplug_testkit.zoo.broken_experts import BrokenExperts, MisreadExperts

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import ExpertFunction
    from quantplug.weight import Weight


class ReversedExperts(MisreadExperts):
    """Counts the experts from the last one."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take the expert at the other end."""
        return self.held(prepared, prepared.problem.experts - 1 - number)


class LastExpertSkipped(BrokenExperts):
    """Launches one expert too few."""

    caught_by = ("test_result_is_within_the_derived_bound", "test_all_rows_may_take_one_expert")

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Leave out the rows of the last expert."""
        return y if self._last else super().add(y, output, here)

    def expert(self, x: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Remember whether this is the last."""
        self._last = number == prepared.problem.experts - 1
        return super().expert(x, prepared, number)


class UpBeforeGate(MisreadExperts):
    """Takes the first half of w13 for up and the second for gate."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Swap them, biases included."""
        return replace(weights, w13=weights.w13[::-1], b13=weights.b13[::-1])


class InterleavedGateAndUp(BrokenExperts):
    """Takes rows of gate and up to alternate, as gpt-oss files have them."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Read every second column."""
        if function.gated:
            product = torch.cat([product[..., ::2], product[..., 1::2]], dim=-1)
        return super().between(product, function)


class FunctionOfUp(BrokenExperts):
    """Applies the function to up and multiplies by gate, each with its own limit."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Turn the halves round."""
        if function.gated:
            product = torch.cat(product.chunk(2, dim=-1)[::-1], dim=-1)
        return super().between(product, function)


class OneScaleForAllExperts(MisreadExperts):
    """Multiplies all experts by the scales of the first."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take expert 0's."""
        return _with(weights, self.held(prepared, 0), "scales")


class LargestScaleForGateAndUp(MisreadExperts):
    """Uses the larger of the scales that gate and up have for both, without requantizing."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take the maximum where there is one scale each."""
        if any(part.scales.numel() != 1 for part in weights.w13):
            return weights
        largest = torch.stack([part.scales for part in weights.w13]).amax(0)
        return replace(weights, w13=tuple(replace(part, scales=largest) for part in weights.w13))


class OrderOfTheFirstExpert(MisreadExperts):
    """Assigns inputs to groups as the first expert does."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take expert 0's g_idx."""
        return _with(weights, self.held(prepared, 0), "g_idx")


class OrderOfGateForUp(MisreadExperts):
    """Permutes x once for gate and up."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take gate's g_idx for both."""
        order = weights.w13[0].g_idx
        if order is None:
            return weights
        return replace(weights, w13=tuple(replace(part, g_idx=order) for part in weights.w13))


class NoOrder(MisreadExperts):
    """Takes inputs to lie in the order of their groups."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Forget g_idx."""
        return _map(weights, lambda weight: replace(weight, g_idx=None))


class ZerosOfTheFirstExpert(MisreadExperts):
    """Subtracts the zero points of the first expert."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take expert 0's."""
        return _with(weights, self.held(prepared, 0), "zeros")


class GlobalScaleOfTheFirstExpert(MisreadExperts):
    """Multiplies by the global scale of the first expert."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take expert 0's."""
        return _with(weights, self.held(prepared, 0), "global_scale")


class GlobalScaleOfGateForUp(MisreadExperts):
    """Keeps one global scale for the fused projection."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take gate's for both."""
        factor = weights.w13[0].global_scale
        if factor is None:
            return weights
        return replace(weights, w13=tuple(replace(part, global_scale=factor) for part in weights.w13))


class BlocksCountedThroughGateAndUp(MisreadExperts):
    """Counts blocks of rows from the first row of gate, also where up begins within one."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Shift the blocks of up."""
        spec = weights.w13[0].spec
        if not isinstance(spec.granularity, PerBlock) or len(weights.w13) == 1:
            return weights
        gate, up = weights.w13
        size = spec.granularity.n
        start, last = gate.out_features, up.scales.shape[0] - 1
        rows = [min((start + row) // size - start // size, last) for row in range(up.out_features)]
        shifted = replace(spec, granularity=PerBlock(1, spec.granularity.k))
        return replace(weights, w13=(gate, replace(up, scales=up.scales[rows], spec=shifted)))


class BiasOfTheFirstExpert(MisreadExperts):
    """Adds the first expert's bias to all."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take expert 0's b13."""
        return replace(weights, b13=self.held(prepared, 0).b13)


class NoFirstBias(MisreadExperts):
    """Leaves out the bias before the function."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Forget b13."""
        return replace(weights, b13=())


class NoSecondBias(MisreadExperts):
    """Leaves out the bias of down."""

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Forget b2."""
        return replace(weights, b2=None)


class SecondBiasWithoutTheRouter(BrokenExperts):
    """Adds the bias of down after the router's weight has multiplied."""

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Take the weighted bias off again and add it as it is."""
        output = super().weigh(x, factor, prepared, number)
        bias = self.weights(prepared, number).b2
        return output if bias is None else output + bias * (1 - factor)


class WeightsInBfloat16(MisreadExperts):
    """Rounds dequantized weights to bfloat16 and does not say so."""

    def product(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Round."""
        return torch.nn.functional.linear(x, weight.dequantize(torch.bfloat16).float())

    def misread(self, weights: ExpertWeights, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Read them as they are."""
        return weights


def _map(weights: ExpertWeights, change: Callable[[Weight], Weight]) -> ExpertWeights:
    return replace(weights, w13=tuple(change(part) for part in weights.w13), w2=change(weights.w2))


def _with(weights: ExpertWeights, other: ExpertWeights, name: str) -> ExpertWeights:
    """The weights with one tensor of each projection taken from another expert."""
    parts = tuple(replace(part, **{name: getattr(its, name)}) for part, its in zip(weights.w13, other.w13, strict=True))
    return replace(weights, w13=parts, w2=replace(weights.w2, **{name: getattr(other.w2, name)}))
