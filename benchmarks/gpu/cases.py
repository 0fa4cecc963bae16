"""
What is measured: formats, shapes, numbers of rows, and weights of plausible values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantplug.activations import read_activation
from quantplug.spec import (
    ElementType,
    LinearProblem,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    SegmentSpec,
    WeightSpec,
    scale_shape,
)
from quantplug.weight import ActivationParams, Weight

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
QUICK_SHAPES = ((4096, 4096), (4096, 14336))
ROWS = (1, 4, 16, 32, 64, 128, 512, 2048, 8192)
QUICK_ROWS = (1, 16, 128, 2048)

_E4M3 = ElementType.FLOAT8_E4M3FN
_X_SCALE = 4.0 / 448
"""The stored scale of x: four standard deviations are the largest code."""


@dataclass(frozen=True, slots=True)
class Format:
    """
    One number format.

    Attributes:
        name: as tables spell it.
        weight: the numeric contract.
        activation: what the file permits about x, as `quantplug.activations` spells it.
    """

    name: str
    weight: WeightSpec
    activation: str = "none"

    @property
    def quantizes_x(self) -> bool:
        """Whether x is multiplied in 8 bits."""
        return self.activation != "none"


FORMATS = {
    format.name: format
    for format in (
        Format("int4 g128", WeightSpec(ElementType.INT4, PerGroup(128), "float16")),
        Format("fp8 weight-only", WeightSpec(_E4M3, PerChannel(), "float32")),
        Format("mxfp8 weight-only", WeightSpec(_E4M3, PerGroup(32), "float8_e8m0fnu")),
        Format("fp8 tensor w8a8", WeightSpec(_E4M3, PerTensor(), "float32"), "float8_e4m3fn/tensor/static"),
        Format("fp8 channel w8a8", WeightSpec(_E4M3, PerChannel(), "float32"), "float8_e4m3fn/token/dynamic"),
        Format("fp8 block w8a8", WeightSpec(_E4M3, PerBlock(128, 128), "float32"), "float8_e4m3fn/group128/dynamic"),
    )
}


@dataclass(frozen=True, slots=True)
class Case:
    """One layer: y `[M, N]` = x `[M, K]` W^T in bfloat16."""

    format: str
    n: int
    k: int

    @property
    def problem(self) -> LinearProblem:
        """What kernels are asked about."""
        kind = FORMATS[self.format]
        permission = read_activation(kind.activation, self.format)
        return LinearProblem(self.k, (SegmentSpec(self.n, kind.weight),), "bfloat16", activation=permission)

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales at their stored width: what a product must read at least."""
        spec = FORMATS[self.format].weight
        rows, groups = scale_shape(spec.granularity, self.n, self.k)
        scale_bits = {"float16": 16, "float32": 32, "float8_e8m0fnu": 8}[spec.scale_dtype]
        return (self.n * self.k * spec.element.bits + rows * groups * scale_bits) // 8

    def weight(self, device: torch.device) -> Weight:
        """Return a weight whose values are about 1 in size; the same for the same case."""
        spec = FORMATS[self.format].weight
        generator = torch.Generator(device).manual_seed(self.n + self.k)

        def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

        shape = scale_shape(spec.granularity, self.n, self.k)
        if spec.element is ElementType.INT4:
            codes = integers(-8, 8, (self.n, self.k), torch.int8)
        else:
            # Without the two codes that are not numbers, and not larger than 8.
            codes = (integers(0, 256, (self.n, self.k), torch.uint8) & 0xBF).view(torch.float8_e4m3fn)
        if spec.scale_dtype == "float8_e8m0fnu":
            scales = integers(118, 122, shape, torch.uint8).view(torch.float8_e8m0fnu)
        else:
            scales = torch.rand(shape, generator=generator, device=device) * 0.01 + 0.005
            scales = scales.to(getattr(torch, spec.scale_dtype))
        return Weight(codes, scales, spec)

    def activation(self) -> ActivationParams | None:
        """Return what the file stores about x."""
        if not FORMATS[self.format].activation.endswith("static"):
            return None
        return ActivationParams(torch.tensor(_X_SCALE))

    def inputs(self, rows: int, device: torch.device) -> torch.Tensor:
        """Return x `[M, K]`, standard normal."""
        generator = torch.Generator(device).manual_seed(rows)
        return torch.randn(rows, self.k, generator=generator, device=device).to(torch.bfloat16)


def on_cpu(weight: Weight) -> Weight:
    """Return the same weight on the CPU, where kernels take it from."""
    return Weight(weight.codes.cpu(), weight.scales.cpu(), weight.spec)
