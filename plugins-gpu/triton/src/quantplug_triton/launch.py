"""
How many programs of which size a product is cut into, and the operator that launches them.
"""

from __future__ import annotations

from functools import cache
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from quantplug_triton.device import add_shares, multiply
from quantplug_triton.fit import TILE_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

INTERPRETED: bool = triton.knobs.runtime.interpret
"""
Triton's interpreter multiplies bfloat16 tiles as if they were integers, and cuts off what it rounds to bfloat16.
Products are the same in float32, and torch rounds the result.
"""

PROGRAMS = 3.5
"""Programs per multiprocessor that a small product is cut into, at least: enough loads under way for the memory."""

MOST_SHARES = 16


class Cut(NamedTuple):
    """Rows and outputs of a tile, warps that compute it, loads ahead, and into how many shares chunks are cut."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    shares: int


def cut(rows: int, outputs: int, steps: int, processors: int) -> Cut:
    """
    Return how a product is cut.

    Args:
        rows: M.
        outputs: N.
        steps: of the loop over chunks; each covers `8 / bits` of them.
        processors: multiprocessors of the device.
    """
    block_m = min(64, max(16, triton.next_power_of_2(max(1, rows))))
    block_n = 128 if rows > 64 and outputs >= 128 else TILE_ROWS
    tiles = triton.cdiv(max(1, rows), block_m) * triton.cdiv(outputs, block_n)
    wanted = triton.next_power_of_2(ceil(PROGRAMS * processors / tiles))
    return Cut(block_m, block_n, 4, 4 if rows <= 64 else 3, max(1, min(MOST_SHARES, steps // 2, wanted)))


@cache
def processors(index: int | None) -> int:
    """Return the multiprocessors of a device; a modest number where there is no device (the interpreter)."""
    if index is None:
        return 8
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    columns: torch.Tensor | None, factor: torch.Tensor | None, bias: torch.Tensor | None,
    outputs: int, kind: int, bits: int, middle: int, chunk: int, per_group: int, rows_per_scale: int,
) -> torch.Tensor:  # fmt: skip
    rows, inputs = x.shape
    y = torch.empty(rows, outputs, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if rows == 0:
        return y.to(x.dtype)
    fields = 8 // bits
    chunks = codes.shape[1] // chunk * fields
    plan = cut(rows, outputs, chunks // fields, processors(x.device.index))
    steps = triton.cdiv(chunks // fields, plan.shares)
    shares = triton.cdiv(chunks // fields, steps)
    whole = shares == 1
    target = y if whole else torch.empty(shares, rows, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(outputs, plan.block_n), triton.cdiv(rows, plan.block_m), shares)
    multiply[grid](
        x, codes, scales, zeros, columns, factor if whole else None, bias if whole else None, target,
        rows, outputs, inputs, chunks, steps * fields, scales.shape[0], per_group, rows_per_scale, scales.shape[1],
        x.stride(0), x.stride(1), outputs, rows * outputs,
        KIND=kind, BITS=bits, MIDDLE=middle, CHUNK=chunk,
        COLUMNS=columns is not None, FACTOR=whole and factor is not None, BIAS=whole and bias is not None,
        EXACT=x.dtype == torch.float32 or INTERPRETED, ONE_GROUP=per_group % fields == 0,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, TILE_ROWS=TILE_ROWS,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if not whole:
        add_shares[(triton.cdiv(outputs, 256), rows)](
            target, factor, bias, y, rows, outputs, outputs, rows * outputs,
            SHARES=shares, FACTOR=factor is not None, BIAS=bias is not None, BLOCK=256, num_warps=2,
        )  # fmt: skip
    return y.to(x.dtype)


def _fake(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
          columns: torch.Tensor | None, factor: torch.Tensor | None, bias: torch.Tensor | None,
          outputs: int, *sizes: int) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


_SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? columns, Tensor? factor, Tensor? bias, "
    "int outputs, int kind, int bits, int middle, int chunk, int per_group, int rows_per_scale) -> Tensor"
)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define("quantplug_triton::linear", _SCHEMA)
    # On the CPU only Triton's interpreter runs it, in tests.
    torch.library.impl("quantplug_triton::linear", ("CUDA", "CPU"), _linear)
    torch.library.register_fake("quantplug_triton::linear", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_triton.linear.default
    return operator


linear = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` as one operator of torch, see `prepare.py` for the tensors."""
