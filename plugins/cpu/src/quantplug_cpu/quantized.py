"""
The product of 8-bit codes of x with 8-bit codes of a weight that is kept as bytes.

A dynamic scale is `amax / 127` of a row, or of all of x, and never below `2^-126`. Codes are `x / scale`, rounded to
the nearest, ties to even, limited to their range. Codes of x with a zero point are shifted into the range of int8; what
that takes away, `(128 - zero)` times the sum of a row's codes, is an integer that is added to the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantplug_cpu.ops import differentiate, register
from quantplug_cpu.stacked import joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.weight import ActivationParams, Prepared, Weight
    from quantplug_cpu.checks import Place
    from quantplug_cpu.stacked import Runs, Stack

_TOP = 127.0

_PIECE_ROWS = 256
"""
Rows that are multiplied at once. Temporaries take 12 bytes for each element of x and y, and memory that is new to the
process costs more to touch than these operations do.
"""

_ALIASED = 2048
"""
Rows of codes that are a multiple of this apart compete for one place in the cache when torch transposes them, which it
does for any x of several rows. Multiplied the other way round they stay as they are; see benchmarks/README.md.
"""

_LEAST_SCALE = torch.finfo(torch.float32).tiny


def places(segments: Sequence[Weight], activation: Sequence[ActivationParams | None]) -> dict[str, Place]:
    """
    Return shape and dtype of the tensors that `cpu.w8a8` needs besides codes.

    - `row_scales`: float32 `[N]`;
    - `x_scale.i`: float32 `[]`, a stored scale of x for segment i, or for all segments where they have the same;
    - `x_zero.i`: float32 `[]`, its zero point, where codes of x are unsigned;
    - `offsets`: int32 `[N]`, what zero points add to the product.

    Raises:
        ValueError: some segments have a stored scale or zero point and others do not.
    """
    rows = sum(weight.out_features for weight in segments)
    wanted: dict[str, Place] = {"row_scales": ((rows,), torch.float32)}
    for name, stored in (("x_scale", "scale"), ("x_zero", "zero")):
        there = [getattr(params, stored, None) is not None for params in activation]
        if any(there) and not all(there):
            raise ValueError(f"a stored {stored} of x is there for some segments only: {there}")
        if any(there):
            wanted |= {f"{name}.{number}": ((), torch.float32) for number in range(_parts(activation))}
    if "x_zero.0" in wanted:
        wanted["offsets"] = (rows,), torch.int32
    return wanted


def fill(prepared: Prepared, segments: Sequence[Weight], activation: Sequence[ActivationParams | None]) -> None:
    """Write the tensors that `places` declares; codes are there already."""
    tensors = prepared.tensors
    row = 0
    for number, (weight, params) in enumerate(zip(segments, activation, strict=True)):
        rows = slice(row, row + weight.out_features)
        row = rows.stop
        tensors["row_scales"][rows] = weight.scales[:, 0].expand(weight.out_features)
        if params is None:
            continue
        if params.scale is not None and f"x_scale.{number}" in tensors:
            tensors[f"x_scale.{number}"].copy_(params.scale)
        if params.zero is not None:
            if f"x_zero.{number}" in tensors:
                tensors[f"x_zero.{number}"].copy_(params.zero)
            sums = tensors["codes.0"][rows].sum(1, dtype=torch.int32)
            tensors["offsets"][rows] = sums * (128 - int(params.zero))


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, pad = prepared.tensors, prepared.meta["pad"]
    rows = x.numel() // x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(rows, x.shape[-1])
    if pad:
        flat = torch.nn.functional.pad(flat, (0, pad))
    activation = prepared.problem.activation
    whole = activation is not None and activation.granularity == "tensor"
    product = _by_pieces if rows > _PIECE_ROWS or x.requires_grad else quantized_linear
    codes, scales, offsets = tensors["codes.0"], tensors["row_scales"], tensors.get("offsets")
    if "x_scale.1" not in tensors:
        y = product(flat, codes, scales, tensors.get("x_scale.0"), tensors.get("x_zero.0"), offsets, bias, whole)
    else:
        sizes = [segment.out_features for segment in prepared.problem.segments]
        nothing = [None] * len(sizes)
        parts = [
            product(flat, part, scale, tensors[f"x_scale.{i}"], tensors.get(f"x_zero.{i}"), offset, some, whole)
            for i, (part, scale, offset, some) in enumerate(
                zip(
                    codes.split(sizes),
                    scales.split(sizes),
                    nothing if offsets is None else offsets.split(sizes),
                    nothing if bias is None else bias.split(sizes),
                    strict=True,
                )
            )
        ]
        y = torch.cat(parts, dim=1)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def multiply_stacked(x: torch.Tensor, runs: Runs, stack: Stack, bias: torch.Tensor | None) -> torch.Tensor:
    """
    Return `[P, N]` for x `[P, K]`, whose rows belong to one expert after the other.

    Args:
        x: in the problem's dtype.
        runs: experts, each with its number of rows.
        stack: experts of the layout.
        bias: `[E, N]` or None.
    """
    return joined(
        [
            multiply(rows, stack.one(expert), None if bias is None else bias[expert])
            for (expert, _), rows in zip(runs, x.split([count for _, count in runs]), strict=True)
        ]
    )


def quantized_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    whole: bool,
) -> torch.Tensor:
    """
    Return `[M, N]`, the product of x as it is when quantized, in the dtype of x.

    Args:
        x: `[M, K]`, bfloat16, float16 or float32.
        codes: int8 `[N, K]`.
        scales: float32 `[N]`.
        x_scale: float32 `[]`, or None to compute it from x.
        x_zero: float32 `[]` for unsigned codes of x, or None.
        offsets: int32 `[N]`, with `x_zero`.
        bias: `[N]` in the dtype of x, or None.
        whole: whether a scale that is computed is one for all of x, not one per row.
    """
    if x_scale is None:
        x_scale = _dynamic_scale(x, whole=whole)
    x_codes = x.to(torch.float32, copy=True).div_(x_scale).round_()
    x_codes = x_codes.clamp_(-128, 127) if x_zero is None else x_codes.add_(x_zero).clamp_(0, 255).sub_(128)
    sums = _multiply_codes(x_codes.to(torch.int8), codes)
    if offsets is not None:
        sums = sums.add_(offsets)
    y = torch.mul(sums, scales).mul_(x_scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def quantized_linear_by_pieces(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    whole: bool,
) -> torch.Tensor:
    """Return what `quantized_linear` does, for some rows at a time, so that temporaries stay small."""
    if x_scale is None and whole:
        x_scale = _dynamic_scale(x, whole=True)
    y = x.new_empty(x.shape[0], codes.shape[0])
    for some, target in zip(x.split(_PIECE_ROWS), y.split(_PIECE_ROWS), strict=True):
        target.copy_(quantized_linear(some, codes, scales, x_scale, x_zero, offsets, bias, whole))
    return y


def _multiply_codes(x_codes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return int32 `[M, N]`."""
    if x_codes.shape[0] > 1 and codes.shape[1] % _ALIASED == 0:
        return torch._int_mm(codes, x_codes.t()).t().contiguous()
    return torch._int_mm(x_codes, codes.t())


def _dynamic_scale(x: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """Return float32 `[M, 1]`, or `[1, 1]` for all of x."""
    amax = x.abs().amax(1, keepdim=True)
    if whole:
        # One more, because there is no largest of nothing.
        amax = torch.nn.functional.pad(amax, (0, 0, 0, 1)).amax(0, keepdim=True)
    return amax.to(torch.float32).div_(_TOP).clamp_(min=_LEAST_SCALE)


def _parts(activation: Sequence[ActivationParams | None]) -> int:
    """Return how many segments are told apart by what is stored about x: 1 when all have the same."""
    stored = {tuple(None if t is None else float(t) for t in (p.scale, p.zero)) for p in activation if p is not None}
    return 1 if len(stored) <= 1 else len(activation)


def _fake(x: torch.Tensor, codes: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, scales = inputs[:3]
    ctx.save_for_backward(codes, scales)
    ctx.dtype, ctx.bias = x.dtype, inputs[6] is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Rounding has no gradient of its own: it is passed straight through.
    codes, scales = ctx.saved_tensors
    back = torch.mm(grad.to(torch.float32) * scales, codes.to(torch.float32)).to(ctx.dtype)
    return back, None, None, None, None, None, grad.sum(0) if ctx.bias else None, None


_by_pieces = register(
    "quantized_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? x_scale, Tensor? x_zero, Tensor? offsets, Tensor? bias, "
    "bool whole) -> Tensor",
    quantized_linear_by_pieces,
    _fake,
)
differentiate("quantized_linear", _keep_operands, _backward)
