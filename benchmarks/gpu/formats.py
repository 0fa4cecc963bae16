"""
The number formats that are measured, weights of plausible values in them, and x as a format permits it to be quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec, scale_shape
from quantplug.weight import ActivationParams, Weight

_E4M3 = ElementType.FLOAT8_E4M3FN
_LARGEST_CODE = 448
_X_SCALE = 4.0 / _LARGEST_CODE
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
        """Whether x may be multiplied in 8 bits."""
        return self.activation != "none"

    def params(self) -> ActivationParams | None:
        """Return what the file stores about x."""
        return ActivationParams(torch.tensor(_X_SCALE)) if self.activation.endswith("static") else None

    def as_permitted(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 x `[M, K]` as it is when it is quantized as the format permits."""
        exact, params = x.to(torch.float32), self.params()
        if not self.quantizes_x:
            return exact
        if isinstance(self.weight.granularity, PerBlock):
            exact = exact.view(x.shape[0], -1, self.weight.granularity.k)
        if params is not None and params.scale is not None:
            scale = params.scale.to(x.device)
        else:
            scale = exact.abs().amax(-1, keepdim=True) / _LARGEST_CODE
        codes = (exact / scale).clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.float8_e4m3fn)
        return (codes.to(torch.float32) * scale).view(x.shape)


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

EXPERT_FORMATS = ("int4 g128", "fp8 weight-only", "mxfp8 weight-only", "fp8 channel w8a8")
"""Those that experts are measured in."""


def stored_bytes(spec: WeightSpec, n: int, k: int) -> int:
    """Return the bytes of codes and scales at their stored width: what a product must read at least."""
    rows, groups = scale_shape(spec.granularity, n, k)
    scale_bits = {"float16": 16, "float32": 32, "float8_e8m0fnu": 8}[spec.scale_dtype]
    return (n * k * spec.element.bits + rows * groups * scale_bits) // 8


def made_weight(spec: WeightSpec, n: int, k: int, seed: int, device: torch.device) -> Weight:
    """Return a weight `[N, K]` whose values are about 0.01 in size; the same for the same seed and kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    shape = scale_shape(spec.granularity, n, k)
    if spec.element is ElementType.INT4:
        codes = integers(-8, 8, (n, k), torch.int8)
    else:
        # Without the two codes that are not numbers, and not larger than 2.
        codes = (integers(0, 256, (n, k), torch.uint8) & 0xBF).view(torch.float8_e4m3fn)
    if spec.scale_dtype == "float8_e8m0fnu":
        scales = integers(118, 122, shape, torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = torch.rand(shape, generator=generator, device=device) * 0.01 + 0.005
        scales = scales.to(getattr(torch, spec.scale_dtype))
    return Weight(codes, scales, spec)
