"""
What torch itself has for linear layers: cuBLAS in bfloat16, its int4 product, its scaled products in FP8.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.contenders import Contender, Held
from quantplug.spec import ElementType

if TYPE_CHECKING:
    from benchmarks.gpu.cases import LinearCase

_INFORMATIVE_ROWS = (1, 128, 2048)


class Bfloat16(Contender):
    """cuBLAS in bfloat16, the layer dequantized once for all: two to four times the memory."""

    name = "bf16 F.linear"
    role = "reference"

    def refuses(self, case: LinearCase) -> str:
        """Never."""
        return ""

    def prepare(self, case: LinearCase) -> Held:
        """Dequantize."""
        return Held({"weight": case.weight(CUDA).dequantize(torch.bfloat16)}, {})

    def call(self, given: torch.Tensor, held: Held, case: LinearCase) -> torch.Tensor:
        """Multiply."""
        return torch.nn.functional.linear(given, held.tensors["weight"])


class TinyGemm(Contender):
    """torch's own int4 product, which torchao uses; its scales are bfloat16."""

    name = "torch int4"

    def concerns(self, case: LinearCase) -> bool:
        """4-bit integers only."""
        return case.of_format.weight.element is ElementType.INT4

    def refuses(self, case: LinearCase) -> str:
        """Never."""
        return ""

    def prepare(self, case: LinearCase) -> Held:
        """Pack codes two to a byte, scales and zeros in pairs."""
        weight = case.weight(CUDA)
        codes = (weight.codes.to(torch.int32) + 8).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        scales = weight.scales.t().to(torch.bfloat16)
        pairs = torch.stack([scales, torch.zeros_like(scales)], dim=2).contiguous()
        return Held({"packed": packed, "pairs": pairs}, {})

    def call(self, given: torch.Tensor, held: Held, case: LinearCase) -> torch.Tensor:
        """Multiply."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(given, held.tensors["packed"], 128, held.tensors["pairs"])
        return y

    def rows(self, asked: tuple[int, ...], case: LinearCase) -> tuple[int, ...]:
        """Leave out many rows: its time grows with every 16 of them."""
        return tuple(rows for rows in asked if rows <= 64)


class ScaledProduct(Contender):
    """
    torch's scaled product in FP8 as engines call it: with fast accumulation where it exists, whose error has no bound.

    Args:
        given: whether x is quantized outside of the time that is measured.
    """

    def __init__(self, *, given: bool) -> None:
        self._given = given
        if given:
            self.role = "informative"
        self.name = "torch fp8, x given" if given else "torch fp8"

    def concerns(self, case: LinearCase) -> bool:
        """FP8 on both sides only."""
        return case.of_format.quantizes_x

    def quantizes_x(self, case: LinearCase) -> bool:
        """Always."""
        return True

    def refuses(self, case: LinearCase) -> str:
        """Refuse where nothing is there to quantize x."""
        return "" if find_spec("triton") is not None else "Triton quantizes x, and is not installed"

    def prepare(self, case: LinearCase) -> Held:
        """Keep codes, and scales as torch takes them."""
        weight = case.weight(CUDA)
        scales = weight.scales.to(torch.float32)
        return Held({"codes": weight.codes, "scales": scales if scales.shape[0] * 128 == case.n else scales.t()}, {})

    def ready(self, given: torch.Tensor, case: LinearCase) -> Any:
        """Quantize x where that is not measured."""
        return quantize(given, case) if self._given else given

    def call(self, given: Any, held: Held, case: LinearCase) -> torch.Tensor:
        """Quantize x by one launch, and multiply."""
        codes, scales, rows = given if self._given else quantize(given, case)
        blocks = scales.dim() == 2 and scales.shape[1] > 1
        weight_scales = held.tensors["scales"].t() if blocks else held.tensors["scales"]
        y = torch._scaled_mm(
            codes, held.tensors["codes"].t(), scales, weight_scales, out_dtype=torch.bfloat16, use_fast_accum=not blocks
        )
        return y[:rows]

    def rows(self, asked: tuple[int, ...], case: LinearCase) -> tuple[int, ...]:
        """Leave out most rows where what is measured does not count."""
        return tuple(rows for rows in asked if rows in _INFORMATIVE_ROWS) if self._given else asked


def quantize(x: torch.Tensor, case: LinearCase) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return codes, float32 scales and rows of x, quantized as the format permits by the launch of our own plugin."""
    from quantplug_cublas import launch

    permission, dtype = case.of_format.activation, torch.float8_e4m3fn
    if "group" in permission:
        return *launch.by_groups(x, -(-x.shape[0] // 4) * 4, x.shape[1], dtype), x.shape[0]
    if "token" in permission:
        return *launch.by_tokens(x, x.shape[1], dtype), x.shape[0]
    scale = _x_scale(case.format)
    return launch.by_scale(x, scale, x.shape[1], dtype), scale, x.shape[0]


@cache
def _x_scale(format_name: str) -> torch.Tensor:
    from benchmarks.gpu.formats import FORMATS

    params = FORMATS[format_name].params()
    if params is None or params.scale is None:
        raise ValueError(f"{format_name} stores no scale of x")
    return params.scale.reshape(1).to(CUDA)
