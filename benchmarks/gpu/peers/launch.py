"""
Launches of the code in `device.py`, none of which waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from benchmarks.gpu.peers.device import activate, combine, count, gather, place

_CHUNK = 1024
_E4M3 = torch.float8_e4m3fn


class Order(NamedTuple):
    """
    Choices in the order of experts.

    Attributes:
        choices: int32 `[padded]`; M * T where an expert's last block is not full.
        places: int32 `[M * T]`, where each choice is.
        owners: int32 `[blocks]`, the expert of each block of rows.
        ends: int32 `[E]`, where each expert's blocks end.
        total: int32 `[1]`, where all end.
    """

    choices: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor
    ends: torch.Tensor
    total: torch.Tensor


def aligned(ids: torch.Tensor, experts: int, block: int) -> Order:
    """Return the order of choices, int32 ids `[M, T]`, each expert's filled up to blocks of rows."""
    choices = ids.numel()
    # Every expert that is chosen may have one block that is not full.
    blocks = (choices + min(choices, experts) * (block - 1)) // block
    padded = blocks * block
    chunk = max(16, min(_CHUNK, triton.next_power_of_2(choices)))
    chunks = triton.cdiv(choices, chunk)
    bins = max(16, triton.next_power_of_2(experts + 1))
    made = torch.empty(padded + choices + blocks + experts + 1, dtype=torch.int32, device=ids.device)
    order = Order(*made.split([padded, choices, blocks, experts, 1]))
    work = torch.empty(2, chunks, bins, dtype=torch.int32, device=ids.device)
    if chunks > 1:
        count[(chunks,)](ids, work[0], order.choices, choices, padded, BINS=bins, CHUNK=chunk, num_warps=4)
    place[(chunks,)](
        ids, work[0], work[1], order.choices, order.places, order.owners, order.ends, order.total,
        choices, experts, padded, blocks, chunks,
        ALONE=chunks == 1, BLOCK_M=block, BINS=bins, CHUNK=chunk, CHUNKS=triton.next_power_of_2(chunks), OWNERS=16,
        num_warps=4,
    )  # fmt: skip
    return order


def gathered(
    x: torch.Tensor, order: torch.Tensor, top_k: int, *, quantize: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rows of x `[M, K]` that choices are of, and the scale of each where they are quantized."""
    out = torch.empty(order.shape[0], x.shape[1], dtype=_E4M3 if quantize else x.dtype, device=x.device)
    scales = _scales(out, quantize=quantize)
    block, warps = _whole(x.shape[1])
    gather[(out.shape[0],)](
        x, order, out, scales, top_k, x.shape[1], QUANTIZE=quantize, TOP=448.0, BLOCK=block, num_warps=warps
    )
    return out, scales


def between(gate_up: torch.Tensor, *, quantize: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return SiLU of gate times up for `[rows, 2 I]`, and the scale of each row where it is quantized."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=_E4M3 if quantize else gate_up.dtype, device=gate_up.device)
    scales = _scales(out, quantize=quantize)
    block, warps = _whole(width)
    activate[(rows,)](gate_up, out, scales, width, QUANTIZE=quantize, TOP=448.0, BLOCK=block, num_warps=warps)
    return out, scales


def combined(out: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """Return y `[M, H]` from what experts gave for each choice, at its place or in the order of choices."""
    rows, top_k = weights.shape
    y = torch.empty(rows, out.shape[1], dtype=torch.bfloat16, device=out.device)
    block = min(1024, triton.next_power_of_2(out.shape[1]))
    combine[(rows, triton.cdiv(out.shape[1], block))](
        out, weights, places, y, top_k, out.shape[1], PLACED=places is not None, BLOCK=block, num_warps=4
    )
    return y


def _scales(out: torch.Tensor, *, quantize: bool) -> torch.Tensor | None:
    return torch.empty(out.shape[0], dtype=torch.float32, device=out.device) if quantize else None


def _whole(width: int) -> tuple[int, int]:
    """Return the columns and warps of a program that takes a whole row."""
    block = max(16, triton.next_power_of_2(width))
    return block, max(1, min(16, block // 512))
