"""
How a product with a quantized x is launched: x quantized within it, or by a launch before it.

A scale per token needs the row's largest magnitude first. Both ways are right; which one is taken goes by bytes. Within
the product every program reads x as it is, wherever one that was quantized before is read as codes; and for a scale per
token every program reads whole rows once more. That is cheaper as long as those reads, which the second-level cache
serves, take less time than a launch does, whose own reads and writes of x are not even counted.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from quantplug.spec import ElementType
from quantplug_triton.device import add_shares
from quantplug_triton.grids import GRIDS
from quantplug_triton.launch import INTERPRETED, cut, processors
from quantplug_triton.prepare import kind_of, middle_of
from quantplug_triton.quantizedevice import quantize_pieces, quantize_tokens
from quantplug_triton.w8a8device import multiply_quantized
from quantplug_triton.w8a8fit import NATIVE, chunks_of, held_bits, shared_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.weight import Prepared
    from quantplug_triton.grids import Grid

_FUSED_BYTES = 8 << 20
"""Bytes that the second-level cache of an H100 gives in about the time that a launch and its wait take, two us."""

_FUSED_ROWS = 16
"""Rows that may be quantized within a product: one narrow tile."""

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


def is_fused(shared: str, rows: int, row_bytes: int, tiles: int, shares: int) -> bool:
    """
    Whether x is quantized within the product.

    Args:
        shared: what shares a scale of x.
        rows: M.
        row_bytes: of a row of x.
        tiles: of outputs.
        shares: into how many K is cut.
    """
    readers = tiles * shares if shared == "token" else tiles
    return rows <= _FUSED_ROWS and rows * row_bytes * readers <= _FUSED_BYTES


def call_quantized(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, meta, problem = prepared.tensors, prepared.meta, prepared.problem
    chunks, element = chunks_of(problem), problem.segments[0].weight.element
    if problem.activation is None or chunks is None:
        raise TypeError("prepared for a problem whose file does not permit to quantize x")
    flat = x.reshape(-1, x.shape[-1])
    results, first = [], 0
    for number in range(meta["parts"]):
        rows = meta[f"rows.{number}"]
        results.append(
            linear_quantized(
                flat,
                tensors[f"codes.{number}"],
                tensors[f"scales.{number}"],
                tensors.get(f"x_scale.{number}"),
                None if bias is None else bias[first : first + rows],
                [
                    kind_of(element),
                    held_bits(element),
                    middle_of(element),
                    *chunks[:2],
                    meta[f"rows_per_scale.{number}"],
                ],
                problem.activation.element.value,
                shared_by(problem.activation),
            )
        )
        first += rows
    y = results[0] if len(results) == 1 else torch.cat(results, dim=1)
    return y.view(*x.shape[:-1], problem.out_features)


def _linear_quantized(
    given: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, x_scale: torch.Tensor | None,
    bias: torch.Tensor | None, form: Sequence[int], element: str, shared: str,
) -> torch.Tensor:  # fmt: skip
    kind, bits, middle, chunk, per_group, rows_per_scale = form
    x, (rows, inputs), outputs = given, given.shape, codes.shape[0]
    y = torch.empty(rows, outputs, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if rows == 0:
        return y.to(x.dtype)
    fields = 8 // bits
    chunks = codes.shape[1] // chunk * fields
    plan = cut(rows, outputs, chunks // fields, processors(x.device.index))
    steps = triton.cdiv(chunks // fields, plan.shares)
    shares = triton.cdiv(chunks // fields, steps)
    tiles = triton.cdiv(outputs, plan.block_n)

    grid = GRIDS[ElementType(element)]
    held = held_in(ElementType(element), native=multiplies_float8(x.device.index))
    if shared == "tensor" and x_scale is None:
        x_scale = _scale_of(x, grid.top)
    fused = is_fused(shared, rows, inputs * x.element_size(), tiles, shares)
    if not fused:
        x, x_scale = quantize(x, x_scale, chunks * chunk, chunk, held, shared, grid)
    if held.lifted and bits == 8:
        codes = codes.view(torch.uint8)

    whole = shares == 1
    target = y if whole else torch.empty(shares, rows, outputs, dtype=torch.float32, device=x.device)
    multiply_quantized[(tiles, triton.cdiv(rows, plan.block_m), shares)](
        x, x_scale, codes, scales, bias if whole else None, target,
        rows, outputs, inputs, codes.shape[1], chunks, steps * fields, scales.shape[0], per_group, rows_per_scale,
        scales.shape[1], x.stride(0), x.stride(1), outputs, rows * outputs,
        KIND=kind, BITS=bits, MIDDLE=middle, CHUNK=chunk, GROUPED=scales.shape[0] > 1,
        HELD=held.triton, FUSED=fused, SHARED=shared, EXPONENT=grid.exponent, SPAN=_span(inputs),
        **_rounding(grid, held),
        BIAS=whole and bias is not None, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if not whole:
        add_shares[(triton.cdiv(outputs, 256), rows)](
            target, None, bias, y, rows, outputs, outputs, rows * outputs,
            SHARES=shares, FACTOR=False, BIAS=bias is not None, BLOCK=256, num_warps=2,
        )  # fmt: skip
    return y.to(given.dtype)


def quantize(
    x: torch.Tensor, x_scale: torch.Tensor | None, width: int, chunk: int, held: Held, shared: str, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[M, width]` of x `[M, K]`, and its scales as the product reads them; `x_scale` is the known one."""
    rows, inputs = x.shape
    codes = torch.empty(rows, width, dtype=held.torch, device=x.device)
    if shared == "token":
        x_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = _span(width)
        quantize_tokens[(rows,)](
            x, codes, x_scale, inputs, width, x.stride(0), x.stride(1), **_rounding(grid, held),
            PIECES=triton.cdiv(width, block), BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
        return codes, x_scale
    if x_scale is None:
        dtype = torch.uint8 if shared == "power" else torch.float32
        x_scale = torch.empty(width // chunk, rows, dtype=dtype, device=x.device)
    quantize_pieces[(rows, triton.cdiv(width, _PIECE))](
        x, codes, x_scale, rows, inputs, width, x.stride(0), x.stride(1), **_rounding(grid, held),
        SHARED=shared, EXPONENT=grid.exponent, GROUPS=_PIECE // chunk, GROUP=chunk, num_warps=4,
    )  # fmt: skip
    return codes, x_scale


def _rounding(grid: Grid, held: Held) -> dict[str, float | bool]:
    """Return how the device's code rounds to codes."""
    return {
        "TOP": grid.top, "BOTTOM": grid.bottom, "FRACTION": grid.fraction, "LEAST": grid.least, "ROUND": held.rounded,
    }  # fmt: skip


def _span(inputs: int) -> int:
    """Return how many inputs of a row a program holds at once."""
    power: int = triton.next_power_of_2(inputs)
    return min(_WIDEST, max(16, power))


def _scale_of(x: torch.Tensor, top: float) -> torch.Tensor:
    """Return float32 `[1]`, the scale of all of x; NaN and infinities stay."""
    amax = torch.linalg.vector_norm(x, float("inf")).to(torch.float32)
    scale: torch.Tensor = (amax / top).clamp_(min=_LEAST_NORMAL).reshape(1)
    return scale


def _fake(x: torch.Tensor, codes: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define(
        "quantplug_triton::linear_quantized",
        "(Tensor x, Tensor codes, Tensor scales, Tensor? x_scale, Tensor? bias, int[] form, str element, str shared) "
        "-> Tensor",
    )
    # On the CPU only Triton's interpreter runs it, in tests.
    torch.library.impl("quantplug_triton::linear_quantized", ("CUDA", "CPU"), _linear_quantized)
    torch.library.register_fake("quantplug_triton::linear_quantized", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_triton.linear_quantized.default
    return operator


linear_quantized = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` with x quantized, see `w8a8prepare.py` for the tensors."""
