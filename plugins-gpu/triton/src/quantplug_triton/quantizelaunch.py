"""
Launches of the code that quantizes x, and what its codes are held in.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from quantplug.spec import ElementType
from quantplug_triton.launch import INTERPRETED
from quantplug_triton.quantizedevice import quantize_pieces, quantize_tokens
from quantplug_triton.w8a8fit import NATIVE

if TYPE_CHECKING:
    from quantplug_triton.grids import Grid

_WIDEST = 8192
"""Inputs that a program holds at once."""

_PIECE = 1024
"""Inputs of a program that quantizes groups."""

_LEAST_NORMAL = torch.finfo(torch.float32).tiny


class Held(NamedTuple):
    """The dtype that holds codes of x: to torch, and to Triton; and whether rounding to it is not enough."""

    torch: torch.dtype
    triton: tl.dtype
    rounded: bool

    @property
    def lifted(self) -> bool:
        """Whether codes are not held in eight bits."""
        return self.torch.itemsize > 1


def held_in(element: ElementType, *, native: bool) -> Held:
    """
    Return what holds codes of x where FP8 is multiplied as it is, or where it is not.

    bfloat16 holds each floating-point code. Triton's interpreter multiplies float32.
    """
    if element is ElementType.INT8:
        return Held(torch.int8, tl.int8, True)
    if INTERPRETED:
        return Held(torch.float32, tl.float32, True)
    if not native:
        return Held(torch.bfloat16, tl.bfloat16, True)
    if element is ElementType.FLOAT8_E5M2:
        return Held(torch.float8_e5m2, tl.float8e5, False)
    return Held(torch.float8_e4m3fn, tl.float8e4nv, element is not ElementType.FLOAT8_E4M3FN)


@cache
def multiplies_float8(index: int | None) -> bool:
    """Whether a device has a product of FP8 whose sums are known."""
    return index is not None and "{}.{}".format(*torch.cuda.get_device_capability(index)) in NATIVE


def quantize(
    x: torch.Tensor, x_scale: torch.Tensor | None, width: int, chunk: int, held: Held, shared: str, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[M, width]` of x `[M, K]`, and its scales as the product reads them; `x_scale` is the known one."""
    rows, inputs = x.shape
    codes = torch.empty(rows, width, dtype=held.torch, device=x.device)
    if shared == "token":
        x_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = span(width)
        quantize_tokens[(rows,)](
            x, codes, x_scale, inputs, width, x.stride(0), x.stride(1), **rounding(grid, held),
            PIECES=triton.cdiv(width, block), BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return codes, x_scale
    if x_scale is None:
        dtype = torch.uint8 if shared == "power" else torch.float32
        x_scale = torch.empty(width // chunk, rows, dtype=dtype, device=x.device)
    quantize_pieces[(rows, triton.cdiv(width, _PIECE))](
        x, codes, x_scale, rows, inputs, width, x.stride(0), x.stride(1), **rounding(grid, held),
        SHARED=shared, EXPONENT=grid.exponent, GROUPS=_PIECE // chunk, GROUP=chunk, num_warps=4,
    )  # fmt: skip
    return codes, x_scale


def scale_of_all(x: torch.Tensor, top: float) -> torch.Tensor:
    """Return float32 `[1]`, the scale of all of x; NaN and infinities stay."""
    amax = torch.linalg.vector_norm(x, float("inf")).to(torch.float32)
    scale: torch.Tensor = (amax / top).clamp_(min=_LEAST_NORMAL).reshape(1)
    return scale


def rounding(grid: Grid, held: Held) -> dict[str, float | bool]:
    """Return how the device's code rounds to codes."""
    return {
        "TOP": grid.top, "BOTTOM": grid.bottom, "FRACTION": grid.fraction, "LEAST": grid.least, "ROUND": held.rounded,
    }  # fmt: skip


def span(inputs: int) -> int:
    """Return how many inputs of a row a program holds at once."""
    power: int = triton.next_power_of_2(inputs)
    return min(_WIDEST, max(16, power))
