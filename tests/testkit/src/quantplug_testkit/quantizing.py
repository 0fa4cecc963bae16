"""
A kernel that quantizes x in every way that a file can permit: slow, in float32, one rule after the other.

It is what the zoo breaks, and a reading of `oracles.activation` in torch. It shares nothing with that oracle.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.kernel import Accepted, Rejected, Verdict
from quantplug.reference import ReferenceKernel
from quantplug.spec import ActivationSpec, ElementType
from quantplug.weight import ActivationParams, Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import Weight

_TOPS = {
    ElementType.INT8: 127.0,
    ElementType.FLOAT8_E4M3FN: 448.0,
    ElementType.FLOAT8_E5M2: 57344.0,
    ElementType.FLOAT4_E2M1FN: 6.0,
}
_STORED = ("scale", "zero", "global_scale")
_EMAX = {ElementType.FLOAT8_E4M3FN: 8, ElementType.FLOAT8_E5M2: 15, ElementType.FLOAT4_E2M1FN: 2}


class QuantizingKernel(ReferenceKernel):
    """`y = x W^T + b` with x quantized as the file permits, then everything in float32."""

    name = "testkit.quantizing"
    traits = replace(ReferenceKernel.traits, differentiable=False, tangents=False)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept problems whose file permits to quantize x to a type for which there is a rule."""
        spec = problem.activation
        if spec is None:
            return Rejected("activation", "the file permits none", "testkit.quantizing is for quantized x")
        if spec.element not in _TOPS and (spec.element, spec.dynamic) != (ElementType.UINT8, False):
            return Rejected("activation", f"no rule for {spec.describe()}")
        verdict = super().supports(problem, platform)
        return replace(verdict, quantizes_x=True) if isinstance(verdict, Accepted) else verdict

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep what is stored about x beside the canonical tensors."""
        prepared = super().prepare(problem, segments, activation, device)
        stored = {
            f"{name}.x.{number}": value.to(device)
            for number, params in enumerate(activation)
            for name in _STORED
            if (value := getattr(params, name, None)) is not None
        }
        return replace(prepared, tensors={**prepared.tensors, **stored}).into(out)

    def params(self, prepared: Prepared, number: int) -> ActivationParams:
        """Return what the file stores about x for one segment."""
        return ActivationParams(*(prepared.tensors.get(f"{name}.x.{number}") for name in _STORED))

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x for each segment, and multiply."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        parts = []
        for number, weight in enumerate(self.unprepare(prepared)):
            operand = self.quantized(rows, prepared, number)
            parts.append(torch.nn.functional.linear(operand, weight.dequantize()))
        y = torch.cat(parts, dim=-1)
        y = y if bias is None else y + bias.to(torch.float32)
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])

    def quantized(self, rows: torch.Tensor, prepared: Prepared, number: int) -> torch.Tensor:
        """Return what float32 rows `[M, K]` become for one segment."""
        spec = prepared.problem.activation
        if spec is None:
            raise ValueError("the file does not permit to quantize x")
        return self.quantize(rows, spec, self.params(prepared, number))

    def quantize(self, rows: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
        """Return what float32 rows `[M, K]` become by one permission."""
        return fake_quantize(rows, spec, params)


def fake_quantize(x: torch.Tensor, spec: ActivationSpec, params: ActivationParams) -> torch.Tensor:
    """Return float32 `[M, K]`, codes times scales; the rules are in `oracles.activation`."""
    scale = params.scale
    if scale is None:
        scale = dynamic_scale(largest(x, spec), spec, params.global_scale)
    codes = nearest(torch.where(scale == 0, 0.0, x / scale), spec.element, params.zero)
    return codes * scale


def largest(x: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """Return the largest magnitude of what each element shares a scale with, in a shape that fits x."""
    size = x.abs()
    match spec.granularity:
        case "tensor":
            # padded, because there is no largest of nothing
            return torch.nn.functional.pad(size.reshape(-1), (0, 1)).amax()
        case "token":
            return size.amax(-1, keepdim=True)
        case "group":
            width, count = spec.group_size, -(-x.shape[1] // spec.group_size)
            groups = torch.nn.functional.pad(size, (0, count * width - x.shape[1])).view(-1, count, width)
            return groups.amax(-1).repeat_interleave(width, 1)[:, : x.shape[1]]


def dynamic_scale(amax: torch.Tensor, spec: ActivationSpec, factor: torch.Tensor | None) -> torch.Tensor:
    """Return the scale that follows from a largest magnitude, float32, the global scale included."""
    if spec.scale_dtype == "float8_e8m0fnu":
        # adding an eighth of its binade carries into the exponent from a significand of 1.75 on
        exponent = (((amax.view(torch.int32) + (1 << 21)) >> 23) - _EMAX[spec.element]).clamp(0, 254)
        # inductor has no float8_e8m0fnu for the CPU; as float32, 2^-127 is a subnormal
        scale = torch.where(exponent == 0, 2.0**-127, (exponent << 23).view(torch.float32))
    elif spec.scale_dtype == "float8_e4m3fn":
        multiplier = 1.0 if factor is None else factor.to(torch.float32)
        stored = (amax / _TOPS[spec.element] / multiplier).clamp(max=448).to(torch.float8_e4m3fn)
        scale = stored.to(torch.float32) * multiplier
    else:
        scale = (amax / _TOPS[spec.element]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(amax.isfinite(), scale, torch.nan)


def nearest(quotient: torch.Tensor, element: ElementType, zero: torch.Tensor | None) -> torch.Tensor:
    """Return the nearest code, less its zero point, as float32."""
    if element is ElementType.FLOAT4_E2M1FN:
        size = quotient.abs().clamp(max=6.0)
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return ((size / step).round() * step).copysign(quotient)
    if element.floating:
        top = _TOPS[element]
        return quotient.clamp(-top, top).to(getattr(torch, element)).to(torch.float32)
    if zero is not None:
        return (quotient.round() + zero).clamp(0, 255) - zero
    return quotient.round().clamp(-128, 127)
