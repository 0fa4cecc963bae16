"""
How the experts of a layer are decoded: every format for linear layers is one for experts, too.

Formats store an expert's projections as they store linear layers, so a `LinearScheme` for each is all that is needed;
what experts add (names, stacking, joined projections, one contract for all) is the same for every format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import PlanError
from quantplug.expertspecs import common_spec, fit_weight, half_spec, halves, row_halves

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.expertrules import Ending, ExpertFiles
    from quantplug.expertweights import ExpertWeights
    from quantplug.spec import WeightSpec
    from quantplug.weight import ActivationParams, Weight


@dataclass(frozen=True, slots=True)
class MoEScheme:
    """
    The decoding of one layer's experts.

    Attributes:
        files: how they are spelled.
        w13: contracts of gate and up, or of up alone, common to all experts.
        w2: contract of down.
    """

    files: ExpertFiles
    w13: tuple[WeightSpec, ...]
    w2: WeightSpec

    @classmethod
    def of(cls, files: ExpertFiles, stored: Sequence[WeightSpec], intermediate: int, where: str) -> MoEScheme:
        """
        Return the decoding of experts whose projections are stored under these contracts, expert by expert.

        Args:
            files: how they are spelled.
            stored: one contract for each projection of each expert; of stacked ones, for each projection.
            intermediate: I.
            where: path of the layer.

        Raises:
            PlanError: `QP-PLAN-EXPERTS` when two experts cannot be brought to one contract without rounding.
        """
        count = len(files.projections)
        specs = []
        for place, name in enumerate(files.projections):
            distinct = dict.fromkeys(stored[place::count])
            spec = common_spec(distinct)
            if spec is None:
                raise PlanError(
                    "QP-PLAN-EXPERTS",
                    where,
                    f"the {name} of its experts is stored as {' and as '.join(s.describe() for s in distinct)}",
                    expected="experts that can share one contract without rounding: the same element type, and groups "
                    "of which one size divides all",
                    fix="Quantize all experts of a layer alike.",
                )
            specs.append(spec)
        *first, second = specs
        if files.joined:
            first = [half_spec(first[0], intermediate, files.order)] * 2
        return cls(files, tuple(first), second)

    def expert(
        self,
        weights: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        biases: Sequence[torch.Tensor],
    ) -> ExpertWeights:
        """
        Return one expert in canonical form.

        Args:
            weights: its stored projections, decoded.
            activation: what is stored about the input of each.
            biases: of each, or none.
        """
        from quantplug.expertweights import ExpertWeights

        *first, second = weights
        b13 = tuple(biases[:-1])
        a13 = tuple(activation[:-1])
        if self.files.joined:
            first = list(halves(first[0], self.files.order))
            b13 = tuple(bias[rows].contiguous() for bias in b13 for rows in row_halves(len(bias), self.files.order))
            a13 = a13 * 2
        w13 = tuple(fit_weight(weight, spec) for weight, spec in zip(first, self.w13, strict=True))
        return ExpertWeights(w13, fit_weight(second, self.w2), b13, biases[-1] if biases else None, a13, activation[-1])


def share(tensor: torch.Tensor, ending: Ending) -> torch.Tensor:
    """Return one expert's share of a stacked tensor as its format has it, contiguous."""
    if ending.transposed and tensor.dim() > 1:
        tensor = tensor.transpose(-1, -2)
    if ending.flattened and tensor.dim() > 1:
        tensor = tensor.flatten(-2)
    return tensor.contiguous()
