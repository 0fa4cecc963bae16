"""
How a product with a quantized x is cut into programs and launched, x quantized within it or by a launch before it.

A scale per token needs the row's largest magnitude first. Both ways are right; which one is taken goes by bytes. Within
the product every program reads x as it is, wherever one that was quantized before is read as codes; and for a scale per
token every program reads whole rows once more. That pays as long as those reads, which the second-level cache serves,
take no longer than the launch that is spared.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from quantplug.spec import ElementType
from quantplug_triton.device import add_shares
from quantplug_triton.grids import GRIDS
from quantplug_triton.launch import INTERPRETED, MOST_SHARES, processors
from quantplug_triton.prepare import kind_of, middle_of
from quantplug_triton.quantizelaunch import held_in, multiplies_float8, quantize, rounding, scale_of_all, span
from quantplug_triton.w8a8device import multiply_quantized
from quantplug_triton.w8a8fit import held_bits, shared_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.weight import Prepared

_FUSED_BYTES = 4 << 20
"""Bytes that the second-level cache of an H100 gives in about a microsecond, as long as a launch in a graph takes."""

_FUSED_ROWS = 16
"""Rows that may be quantized within a product: one narrow tile."""

_ABREAST = 8
"""Tiles of outputs that programs which follow each other take: of 4,096 inputs in FP8, 4 MB at most."""

_PROGRAMS = 2
"""Programs per multiprocessor that K is cut for, where tiles are fewer."""

_SPARE_BYTES = 8 << 10
"""Shared memory that is left to whatever a program needs beside the loads under way."""

_INTERPRETED_BYTES = 96 << 10


class Cut(NamedTuple):
    """Rows and outputs of a tile, warps that compute it, loads ahead at most, and shares of K."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    shares: int


def cut(rows: int, outputs: int, steps: int, multiprocessors: int, *, large: bool) -> Cut:
    """
    Return how a product is cut; this plugin's README says what was tried.

    Args:
        rows: M.
        outputs: N.
        steps: of the loop over chunks.
        multiprocessors: of the device.
        large: whether a program may compute 128 rows of 128 outputs.
    """
    if rows <= 64:
        block_m = max(16, triton.next_power_of_2(rows))
        block_n, warps, stages = (128 if rows <= 16 else 64), 4, 4
    elif large:
        block_m, block_n, warps, stages = (128, 128, 8, 4) if rows > 128 else (128, 64, 4, 4)
    else:
        block_m, block_n, warps, stages = 64, 128, 4, 3
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
    # A power of two, rounded down: sums of shares have to be written, read and added up.
    wanted = 1 << max(1, _PROGRAMS * multiprocessors // tiles).bit_length() - 1
    return Cut(block_m, block_n, warps, stages, max(1, min(MOST_SHARES, steps // 2, wanted)))


@cache
def shared_bytes(index: int | None) -> int:
    """Return the shared memory that a program may have on a device."""
    if index is None:
        return _INTERPRETED_BYTES
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


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
    if problem.activation is None:
        raise TypeError("prepared for a problem whose file does not permit to quantize x")
    element = problem.segments[0].weight.element
    form = [kind_of(element), held_bits(element), middle_of(element), meta["chunk"], meta["per_group"]]
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
                [*form, meta[f"rows_per_scale.{number}"]],
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
    x, (rows, inputs), outputs, index = given, given.shape, codes.shape[0], given.device.index
    y = torch.empty(rows, outputs, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if rows == 0:
        return y.to(x.dtype)
    grid, held = GRIDS[ElementType(element)], held_in(ElementType(element), native=multiplies_float8(index))
    fields, grouped = 8 // bits, scales.shape[0] > 1
    chunks = codes.shape[1] // chunk * fields
    # Where chunks are scaled one by one, or codes lifted, a large tile does not fit into registers or shared memory.
    large = not (grouped or held.lifted or shared in ("group", "power")) and shared_bytes(index) > 4 * 256 * chunk
    plan = cut(rows, outputs, chunks // fields, processors(index), large=large)
    steps = triton.cdiv(chunks // fields, plan.shares)
    shares = triton.cdiv(chunks // fields, steps)
    tiles = triton.cdiv(outputs, plan.block_n)

    if shared == "tensor" and x_scale is None:
        x_scale = scale_of_all(x, grid.top)
    fused = is_fused(shared, rows, inputs * x.element_size(), tiles, shares)
    if not fused:
        x, x_scale = quantize(x, x_scale, chunks * chunk, chunk, held, shared, grid)
    if held.lifted and bits == 8:
        codes = codes.view(torch.uint8)
    loaded = chunk * (plan.block_n + plan.block_m * fields * x.element_size())
    stages = max(2, min(plan.stages, (shared_bytes(index) - _SPARE_BYTES) // loaded))

    whole = shares == 1
    target = y if whole else torch.empty(shares, rows, outputs, dtype=torch.float32, device=x.device)
    multiply_quantized[(tiles * triton.cdiv(rows, plan.block_m), shares)](
        x, x_scale, codes, scales, bias if whole else None, target,
        rows, outputs, inputs, codes.shape[1], chunks, steps * fields, scales.shape[0], per_group, rows_per_scale,
        scales.shape[1], x.stride(0), x.stride(1), outputs, rows * outputs,
        KIND=kind, BITS=bits, MIDDLE=middle, CHUNK=chunk, GROUPED=grouped, HELD=held.triton, FUSED=fused,
        SHARED=shared, EXPONENT=grid.exponent, SPAN=span(inputs) if fused else 0, **rounding(grid, held),
        BIAS=whole and bias is not None, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, ABREAST=_ABREAST,
        num_warps=plan.warps, num_stages=stages,
    )  # fmt: skip
    if not whole:
        add_shares[(triton.cdiv(outputs, 256), rows)](
            target, None, bias, y, rows, outputs, outputs, rows * outputs,
            SHARES=shares, FACTOR=False, BIAS=bias is not None, BLOCK=256, num_warps=2,
        )  # fmt: skip
    return y.to(given.dtype)


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
