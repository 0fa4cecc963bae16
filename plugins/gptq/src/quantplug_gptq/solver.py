"""
The GPTQ algorithm: round one input column after another, and let the columns still to come make up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), with the
columns in order of importance and scales chosen by the same importance.
"""

from __future__ import annotations

import torch

from quantplug_gptq.rounding import Grid, Rounded, round_to_nearest, search_parameters

_BLOCK = 128
_DAMPING = (0.01, 0.1, 1.0)
"""Parts of the mean of the diagonal that are added to it, the next one where the factorisation fails."""


def solve(dense: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, reorder: bool) -> Rounded:
    """
    Quantize a layer so that its outputs on the calibration inputs change least.

    The most important inputs go first. Without a usable Hessian the result is that of `round_to_nearest`.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        hessian: `[K, K]`, the sum or mean of x^T x over the calibration inputs.
        grid: what values the layer may take.
        reorder: whether groups are formed in order of importance, too (act-order); otherwise consecutive inputs share
            a group, and its parameters are chosen before the first column is rounded.
    """
    columns = dense.detach().float().t().contiguous()
    inputs, rows = columns.shape
    size = grid.size(inputs)
    hessian = hessian.float()
    diagonal = hessian.diagonal().clone()
    alive = diagonal > 0
    if not bool(alive.any()) or not bool(torch.isfinite(hessian).all()):
        return round_to_nearest(dense, grid)
    # Inputs that were never active get an average weight; they correlate with nothing, and so are simply rounded.
    diagonal = torch.where(alive, diagonal, diagonal[alive].mean())
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor = _inverse_factor(hessian, diagonal, order)
    if factor is None:
        return round_to_nearest(dense, grid)

    if reorder:
        group = torch.arange(inputs) // size
        scales = columns.new_empty(-(-inputs // size), rows)
        zeros = torch.empty_like(scales)
    else:
        group = order // size
        scales, zeros = search_parameters(columns, grid, diagonal)
    columns, diagonal, group_of = columns[order], diagonal[order], group.tolist()
    codes = torch.empty_like(columns)
    # With act-order a block also ends where a group does: the next group's parameters need finished corrections.
    starts = sorted({*range(0, inputs, _BLOCK), *(range(0, inputs, size) if reorder else ())})
    for start, stop in zip(starts, [*starts[1:], inputs], strict=True):
        if reorder and start % size == 0:
            members = slice(start, start + size)
            found = search_parameters(columns[members], grid, diagonal[members])
            scales[group_of[start]], zeros[group_of[start]] = found[0][0], found[1][0]
        block = slice(start, stop)
        chosen = torch.tensor(group_of[block])
        errors = _round_block(
            columns[block], factor[block, block], scales[chosen], zeros[chosen], codes[block], grid.top
        )
        columns[stop:].addmm_(factor[block, stop:].t(), errors, alpha=-1)
    back = torch.argsort(order)
    return Rounded.of(codes[back], scales, zeros, group[back])


def _round_block(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
    top: int,
) -> torch.Tensor:
    """
    Round a block of columns, each corrected by the errors before it.

    Args:
        columns: `[B, N]`, corrected for all earlier blocks.
        factor: `[B, B]`, the block of the upper triangular factor.
        scales: `[B, N]`, per column.
        zeros: `[B, N]`.
        codes: `[B, N]`, filled.
        top: the largest code.

    Returns:
        The errors `[B, N]`, scaled for the correction of later columns.
    """
    errors = torch.empty_like(columns)
    incoming = factor.t().contiguous()  # row i: what column i takes from the errors before it
    for index, pivot in enumerate(factor.diagonal().tolist()):
        column = columns[index]
        if index:
            column = torch.addmv(column, errors[:index].t(), incoming[index, :index], alpha=-1)
        code = torch.div(column, scales[index], out=codes[index]).add_(zeros[index]).round_().clamp_(0, top)
        torch.addcmul(column, code - zeros[index], scales[index], value=-1, out=errors[index]).div_(pivot)
    return errors


def _inverse_factor(hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor | None:
    """
    Return the upper triangular U with U^T U = (H + damping)^-1, rows and columns in the given order, or None.

    With rows and columns reversed, a Cholesky factor L L^T of H becomes R R^T with an upper triangular R, and U is
    R^-1: one factorisation and one triangular solve, no inverse.
    """
    reverse = order.flip(0)
    work = hessian[reverse][:, reverse]
    for damping in _DAMPING:
        work.diagonal().copy_(diagonal[reverse] + damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(work)
        if int(failed) == 0:
            identity = torch.eye(len(order), dtype=work.dtype)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor if bool(torch.isfinite(factor).all()) else None
    return None
