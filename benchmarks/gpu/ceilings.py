"""
What the device does at most, and so the time that no kernel can go below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import CUDA
from quantplug import stopwatch

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Case

_SIZE = 8192
_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Ceilings:
    """
    What the device does at most.

    Attributes:
        read: bytes per second of reading 2 GiB: what torch's sum reaches.
        bf16: products and sums per second of a bfloat16 product of 8192 x 8192 x 8192.
        fp8: the same in FP8 with one scale each and fast accumulation; 0 where there is none.
    """

    read: float
    bf16: float
    fp8: float

    def roof_us(self, case: Case, rows: int) -> float:
        """Return the larger of reading the weights once and of all products, in microseconds."""
        rate = self.fp8 if case.of_format.quantizes_x and self.fp8 else self.bf16
        return max(case.read_bytes(rows) / self.read, case.operations(rows) / rate) * 1e6


def ceilings() -> Ceilings:
    """Measure the device."""
    plain = stopwatch.ceilings(CUDA, ["bfloat16"], seconds=_SECONDS)
    fp8 = 0.0
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones(1, device=CUDA)
        x, w = (torch.randn(_SIZE, _SIZE, device=CUDA).to(torch.float8_e4m3fn) for _ in range(2))

        def product(_: object) -> torch.Tensor:
            return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        fp8 = 2.0 * _SIZE**3 / stopwatch.per_call(product, [None], CUDA, seconds=_SECONDS) * 1e6
    return Ceilings(plain.read, plain.flops["bfloat16"], fp8)
