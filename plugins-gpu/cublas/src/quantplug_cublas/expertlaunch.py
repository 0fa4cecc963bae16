"""
Launches of the code in `expertdevice.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from quantplug_cublas.expertdevice import activate as activate_kernel
from quantplug_cublas.expertdevice import combine as combine_kernel
from quantplug_cublas.expertdevice import locate, quantize_choices, rank
from quantplug_cublas.launch import LEAST, WIDEST, as_codes, held
from quantplug_cublas.launcher import INTERPRETED
from quantplug_cublas.routed import Routed

if TYPE_CHECKING:
    from quantplug.moe import ExpertFunction

_FLOAT8 = torch.float8_e4m3fn
_TOP = torch.finfo(_FLOAT8).max
_ALONE = 512
"""Choices that one program puts in order by itself."""

_CHOICES = 256
"""Choices of a program where there are several."""


def route(ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, turns: int) -> Routed:
    """Put choices `[M, T]` in the order of the experts; each turn of an expert is a group."""
    count, device = ids.numel(), ids.device
    local, places = torch.empty(2, count, dtype=torch.int32, device=device)
    ends = torch.empty(turns * experts, dtype=torch.int32, device=device)
    alone = count <= _ALONE
    block = max(16, triton.next_power_of_2(count)) if alone else _CHOICES
    blocks, bins = triton.cdiv(count, block), max(16, triton.next_power_of_2(experts + 1))
    counts = ends if alone else torch.empty(blocks, bins, dtype=torch.int32, device=device)
    rank[(blocks,)](
        ids, expert_map, local, places, counts, ends, count, experts,
        0 if expert_map is None else expert_map.shape[0],
        MAP=expert_map is not None, ALONE=alone, TURNS=turns, BINS=bins, BLOCK=block, num_warps=8 if alone else 4,
    )  # fmt: skip
    if not alone:
        locate[(blocks,)](
            local, places, counts, ends, count, experts, blocks,
            TURNS=turns, BINS=bins, BLOCK=block, ROWS=max(1, 8192 // bins), num_warps=8,
        )  # fmt: skip
    return Routed(local, places, ends)


def quantize(
    x: torch.Tensor, weights: torch.Tensor | None, known: torch.Tensor | None, routed: Routed, experts: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return codes `[turns * M * T, width]` of x `[M, K]`, of each choice at its place, and float32 scales.

    Args:
        x: rows.
        weights: float32 `[M, 1]`, what multiplies x first, or None.
        known: float32 `[turns, E]`, stored scales, or None for one of each row.
        routed: from `route`.
        experts: E.
        width: K, filled up.
    """
    (rows, inputs), top_k = x.shape, routed.local.numel() // x.shape[0]
    turns = routed.ends.numel() // experts
    codes = torch.empty(turns * rows * top_k, width, dtype=held(_FLOAT8), device=x.device)
    scales = torch.empty(turns * rows * top_k, dtype=torch.float32, device=x.device)
    block = min(WIDEST, max(16, triton.next_power_of_2(width)))
    quantize_choices[(rows,)](
        x, weights, known, routed.local, routed.places, routed.ends, codes, scales,
        experts, inputs, width, x.stride(0), x.stride(1),
        TOP_K=top_k, ON_INPUT=weights is not None, STATIC=known is not None, TURNS=turns, TOP=_TOP, LEAST=LEAST,
        PIECES=triton.cdiv(width, block), BLOCK=block, num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return as_codes(codes, _FLOAT8), scales


def activate(
    product: torch.Tensor, bias: torch.Tensor | None, known: torch.Tensor | None, routed: Routed, experts: int,
    between: int, width: int, function: ExpertFunction,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Return codes `[M * T, width]` of what f makes of a first product, and float32 scales.

    Args:
        product: bfloat16 `[M * T, 2 * width]`, or of gate and up in turns `[2 * M * T, width]`; half without a gate.
        bias: `[E, I or 2I]`, or None.
        known: float32 `[E]`, stored scales, or None for one of each row.
        routed: from `route`.
        experts: E.
        between: I.
        width: I, filled up.
        function: f.
    """
    choices, apart = routed.local.numel(), routed.ends.numel() > experts
    codes = torch.empty(choices, width, dtype=held(_FLOAT8), device=product.device)
    scales = torch.empty(choices, dtype=torch.float32, device=product.device)
    block = min(WIDEST, max(16, triton.next_power_of_2(width)))
    activate_kernel[(choices,)](
        product, bias, known, routed.local, routed.places, routed.ends, codes, scales,
        experts, between, width, product.stride(0), 2 if function.gated else 1,
        function.limit or 0.0, function.alpha, function.up_offset,
        GATED=function.gated, APART=apart, BIAS=bias is not None, STATIC=known is not None,
        NAME=function.name, LIMITED=function.limit is not None, TOP=_TOP, LEAST=LEAST,
        PIECES=triton.cdiv(width, block), BLOCK=block, num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return as_codes(codes, _FLOAT8), scales


def combine(
    outputs: torch.Tensor, weights: torch.Tensor | None, bias: torch.Tensor | None, routed: Routed, experts: int,
    rows: int, hidden: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """
    Return y `[M, H]`, what each row's experts gave, added up.

    Args:
        outputs: bfloat16 `[M * T, >= H]`, of each choice at its place.
        weights: float32 `[M, T]`, the router's, or None where they were on the input.
        bias: `[E, H]`, or None.
        routed: from `route`.
        experts: E.
        rows: M.
        hidden: H.
        dtype: of y.
    """
    y = torch.empty(rows, hidden, dtype=torch.float32 if INTERPRETED else dtype, device=outputs.device)
    block = min(1024, max(16, triton.next_power_of_2(hidden)))
    combine_kernel[(rows, triton.cdiv(hidden, block))](
        outputs, weights, bias, routed.local, routed.places, y, experts, hidden, outputs.stride(0),
        TOP_K=routed.local.numel() // rows, BIAS=bias is not None, ON_INPUT=weights is None, BLOCK=block,
        num_warps=max(1, block // 256),
    )  # fmt: skip
    return y.to(dtype) if INTERPRETED else y
