"""
Kernels that quantize x wrongly, or other than they say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.kernel import Accepted, Verdict
from quantplug.spec import ElementType
from quantplug.weight import ActivationParams, Prepared
from quantplug_testkit.quantizing import QuantizingKernel, dynamic_scale, fake_quantize, largest, nearest
from quantplug_testkit.zoo.broken import Broken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.platform import Platform
    from quantplug.spec import ActivationSpec, LinearProblem
    from quantplug.weight import Weight


class Misquantizer(Broken, QuantizingKernel):
    """A kernel that quantizes x, with one fault."""


class QuantizesInSilence(Misquantizer):
    """Quantizes x and does not say so."""

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Declare nothing."""
        verdict = super().supports(problem, platform)
        return replace(verdict, quantizes_x=False) if isinstance(verdict, Accepted) else verdict


class SaysItQuantizes(Broken):
    """Declares that it quantizes x and leaves it as it is."""

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Declare what does not happen, where it is permitted."""
        verdict = super().supports(problem, platform)
        permitted = problem.activation is not None
        return replace(verdict, quantizes_x=permitted) if isinstance(verdict, Accepted) else verdict


class QuantizesUnasked(Broken):
    """Declares that it quantizes x whatever the file permits."""

    caught_by = ("test_accepting_is_well_formed",)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Declare it for all problems."""
        verdict = super().supports(problem, platform)
        return replace(verdict, quantizes_x=True) if isinstance(verdict, Accepted) else verdict


class StaleLargest(Misquantizer):
    """Keeps the largest magnitudes of the call before."""

    caught_by = ("test_results_do_not_depend_on_other_calls",)

    def __init__(self) -> None:
        self._rows: dict[torch.Size, torch.Tensor] = {}

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Scale by an earlier x of the same shape."""
        if not spec.dynamic:
            return fake_quantize(rows, spec, params)
        before = self._rows.get(rows.shape, rows)
        self._rows[rows.shape] = rows
        # what is put behind x takes part in the scale, and is cut off again
        return fake_quantize(torch.cat([rows, before], 1), replace(spec, granularity="token"), params)[
            :, : rows.shape[1]
        ]


class StoredScaleIgnored(Misquantizer):
    """Computes scales from x where the file stores one."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Take every permission for a dynamic one."""
        if spec.dynamic or spec.element is ElementType.UINT8:
            return fake_quantize(rows, spec, params)
        return fake_quantize(rows, replace(spec, dynamic=True, granularity="token"), ActivationParams())


class StoredScaleOfTheFirstSegment(Misquantizer):
    """Quantizes x once for a fused layer, though each shard has a scale of its own."""

    def quantized(self, rows: torch.Tensor, prepared: Prepared, number: int) -> torch.Tensor:
        """Use what is stored for the first."""
        return super().quantized(rows, prepared, 0)


class KeepsOldScaleOfX(Misquantizer):
    """Overwrites weights on reload and forgets what is stored about x."""

    caught_by = ("test_preparing_again_keeps_addresses",)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Write the weights only."""
        made = super().prepare(problem, segments, activation, device)
        if out is None:
            return made
        kept = {name: out.tensors[name].clone() if ".x." in name else new for name, new in made.tensors.items()}
        return replace(made, tensors=kept).into(out)


class ZeroPointIgnored(Misquantizer):
    """Leaves the zero point of x out, and so cuts off what is negative."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Take 0 for it."""
        zero = None if params.zero is None else torch.zeros_like(params.zero)
        return fake_quantize(rows, spec, replace(params, zero=zero))


class OneScaleForAllRows(Misquantizer):
    """Uses one scale for all of x where each row has its own."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Widen tokens to the tensor."""
        return fake_quantize(rows, replace(spec, granularity="tensor") if spec.granularity == "token" else spec, params)


class OneScaleForAllGroups(Misquantizer):
    """Uses one scale for a row where each group of inputs has its own."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Widen groups to tokens."""
        return fake_quantize(rows, replace(spec, granularity="token") if spec.granularity == "group" else spec, params)


class LargestIs128(Misquantizer):
    """Divides by the number of codes on one side instead of the largest."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Use `amax / 128` for int8."""
        if spec.element is not ElementType.INT8 or not spec.dynamic or spec.granularity != "token":
            return fake_quantize(rows, spec, params)
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 128
        return nearest(rows / scale, spec.element, None) * scale


class RoundedScaleOfX(Misquantizer):
    """Holds the scales of x in bfloat16."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Round a stored scale."""
        scale = None if params.scale is None else params.scale.bfloat16().float()
        return fake_quantize(rows, spec, replace(params, scale=scale))


class TruncatedCodes(Misquantizer):
    """Drops the fraction instead of rounding."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Cut off towards zero, for integers with a stored scale."""
        if params.scale is None or params.zero is not None or spec.element.floating:
            return fake_quantize(rows, spec, params)
        return (rows / params.scale).trunc().clamp(-128, 127) * params.scale


class TiesAwayFromZero(Misquantizer):
    """Rounds what lies halfway between two codes away from zero, where powers of two make that exact."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Nudge x away from zero."""
        if spec.scale_dtype != "float8_e8m0fnu":
            return fake_quantize(rows, spec, params)
        return fake_quantize(rows * (1 + 2.0**-20), spec, params)


class FlooredPowerOfTwo(Misquantizer):
    """Takes the exponent of the largest magnitude as it is, which cuts off up to an eighth of it."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Leave out the step at 1.75."""
        if spec.scale_dtype != "float8_e8m0fnu":
            return fake_quantize(rows, spec, params)
        # without the last fraction bits of the significand no magnitude reaches the step
        low = (rows.view(torch.int32) & ~0x200000).view(torch.float32)
        scale = dynamic_scale(largest(low, spec), spec, params.global_scale)
        return nearest(rows / scale, spec.element, None) * scale


class GlobalScaleOfXDropped(Misquantizer):
    """Forgets the stored factor of the scales of x."""

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Take 1 for it."""
        return fake_quantize(rows, spec, replace(params, global_scale=None))


class HiddenInfinity(Misquantizer):
    """Lets an infinite x saturate where its scale is computed from it."""

    caught_by = ("test_nan_and_inf_stay_in_their_rows",)

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Cut x off at a large number."""
        return fake_quantize(rows.clamp(-(2.0**64), 2.0**64), spec, params)
