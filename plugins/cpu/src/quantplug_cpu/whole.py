"""
Weights held whole, in the dtype of x: dequantized once, multiplied by torch's dense product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerBlock, PerGroup, PerTensor
from quantplug_cpu.checks import check_shapes, place
from quantplug_cpu.rowwise import linear_by_rows
from quantplug_cpu.stacked import joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import Prepared, Weight
    from quantplug_cpu.stacked import Runs, Stack

_PIECE_WEIGHTS = 1 << 19
"""Weights that are dequantized at once; the float32 temporaries are a few times as large."""

_FEW_ROWS = 3
"""
Rows from which on torch's float16 product, which is not vectorised beyond one row, is slower than float32 tiles; see
benchmarks/README.md.
"""


def prepare(problem: LinearProblem, segments: Sequence[Weight], layout_id: str, out: Prepared | None) -> Prepared:
    """
    Return the values `[N, K]` of all segments, one below the other, as `weight`.

    Raises:
        ValueError: a tensor does not have the shape that the contract says.
    """
    dtype = getattr(torch, problem.dtype)
    for weight in segments:
        check_shapes(weight, problem.in_features)
    wanted = {"weight": ((problem.out_features, problem.in_features), dtype)}
    result = place(wanted, {}, problem, layout_id, out)
    step = max(1, _PIECE_WEIGHTS // problem.in_features)
    row = 0
    for weight in segments:
        for begin in range(0, weight.out_features, step):
            values = _rows(weight, begin, min(begin + step, weight.out_features)).dequantize(dtype)
            result.tensors["weight"][row : row + len(values)] = values
            row += len(values)
    return result


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    return _multiply_rows(x, prepared.tensors["weight"], bias)


def multiply_stacked(x: torch.Tensor, runs: Runs, stack: Stack, bias: torch.Tensor | None) -> torch.Tensor:
    """
    Return `[P, N]` for x `[P, K]`, whose rows belong to one expert after the other.

    Args:
        x: in the problem's dtype.
        runs: experts, each with its number of rows.
        stack: experts of the layout.
        bias: `[E, N]` or None.
    """
    weights = stack.views["weight"]
    return joined(
        [
            _multiply_rows(rows, weights[expert], None if bias is None else bias[expert])
            for (expert, _), rows in zip(runs, x.split([count for _, count in runs]), strict=True)
        ]
    )


def _multiply_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype == torch.float16:
        rows = x.numel() // x.shape[-1]
        if rows >= _FEW_ROWS:
            exact = None if bias is None else bias.to(torch.float32)
            y = linear_by_rows(x.reshape(rows, x.shape[-1]).to(torch.float32), weight, None, exact)
            return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])
    return torch.nn.functional.linear(x, weight, bias)


def _rows(weight: Weight, begin: int, end: int) -> Weight:
    """Return some rows as a weight of its own, without a copy of its codes; blocks become groups of one row."""
    rows = slice(begin, end)
    scales, zeros, granularity = weight.scales, weight.zeros, weight.spec.granularity
    if isinstance(granularity, PerBlock):
        index = torch.arange(begin, end) // granularity.n
        scales = scales.to(torch.float32).index_select(0, index)
        zeros = None if zeros is None else zeros.index_select(0, index)
        granularity = PerGroup(granularity.k)
    elif not isinstance(granularity, PerTensor):
        scales, zeros = scales[rows], None if zeros is None else zeros[rows]
    spec = replace(weight.spec, granularity=granularity)
    return replace(weight, codes=weight.codes[rows], scales=scales, zeros=zeros, spec=spec)
