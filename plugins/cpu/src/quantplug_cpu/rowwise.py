"""
Signed 8-bit codes with one scale per row: kept as bytes `[N, K]`, for torch's int8 operator and for tiles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantplug.spec import PerTensor
from quantplug.weight import Weight
from quantplug_cpu import quantized
from quantplug_cpu.checks import check, place, refuse_rounded, survives
from quantplug_cpu.fit import FAST_DTYPE
from quantplug_cpu.int8 import STEP
from quantplug_cpu.ops import differentiate, register
from quantplug_cpu.stacked import joined
from quantplug_cpu.tiles import tiles
from quantplug_cpu.w8a8 import takes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared
    from quantplug_cpu.checks import Place
    from quantplug_cpu.stacked import Runs, Stack

_MANY_ROWS, _MANY_ROWS_LARGE = 24, 16
_LARGE_WEIGHTS = 1 << 22
# Rows from which on tiles beat the operator, for layers of fewer weights than that and for larger ones; see
# benchmarks/README.md.

_PIECE_BYTES = 1 << 20


def rowwise_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    Return `[M, N]`, x times codes, times scales, plus bias, in the dtype of x.

    Codes are exact in the dtype of x, so that only the sum is rounded, and then once more with scale and bias.

    Args:
        x: `[M, K]`, bfloat16 or float32.
        codes: int8 `[N, K]`; or, for x in float32, float16 values.
        scales: `[N]`, or None for 1.
        bias: `[N]` or None.
    """
    y = x.new_empty(x.shape[0], codes.shape[0])
    scales = None if scales is None else scales.to(x.dtype)
    for begin, end in tiles(*codes.shape):
        values = codes[begin:end].to(x.dtype)
        if scales is None:
            y[:, begin:end] = torch.nn.functional.linear(x, values, None if bias is None else bias[begin:end])
            continue
        product = torch.nn.functional.linear(x, values)
        if bias is None:
            torch.mul(product, scales[begin:end], out=y[:, begin:end])
        else:
            torch.addcmul(bias[begin:end], product, scales[begin:end], out=y[:, begin:end])
    return y


def prepare(
    problem: LinearProblem,
    segments: Sequence[Weight],
    activation: Sequence[ActivationParams | None],
    layout_id: str,
    out: Prepared | None,
) -> Prepared:
    """
    Return codes `[N, K]` with K filled up to a multiple of `STEP`, and a scale per row.

    Canonical codes that already lie so are kept without a copy. Where x may be quantized, what that takes is there.

    Raises:
        ValueError: a tensor does not have the shape or dtype that the contract says.
    """
    check(segments, problem.in_features)
    fast = problem.dtype == FAST_DTYPE
    held = torch.bfloat16 if fast else segments[0].scales.dtype
    k, n = problem.in_features, problem.out_features
    pad = -k % STEP
    wanted: dict[str, Place] = {
        "exact": ((), torch.bool),
        "codes.0": ((n, k + pad), torch.int8),
        "scales.0": ((n,), held),
        **{f"g_idx.{i}": ((k,), torch.int32) for i, weight in enumerate(segments) if weight.g_idx is not None},
    }
    if takes(problem.activation):
        wanted |= quantized.places(segments, activation)
    large = n * k >= _LARGE_WEIGHTS
    meta = {"planes": 0, "pad": pad, "many": (_MANY_ROWS_LARGE if large else _MANY_ROWS) if fast else 0}
    codes = segments[0].codes
    if out is None and len(segments) == 1 and not pad and codes.is_contiguous():
        del wanted["codes.0"]
        rest = place(wanted, meta, problem, layout_id, None)
        result = replace(rest, tensors={"codes.0": codes, **rest.tensors})
    else:
        result = place(wanted, meta, problem, layout_id, out)
        _copy_codes(segments, result.tensors["codes.0"], k)
    result.tensors["exact"].fill_(survives(segments, held))
    result.tensors["scales.0"].copy_(
        torch.cat([weight.scales[:, 0].expand(weight.out_features) for weight in segments])
    )
    for number, weight in enumerate(segments):
        if weight.g_idx is not None:
            result.tensors[f"g_idx.{number}"].copy_(weight.g_idx)
    if "row_scales" in wanted:
        quantized.fill(result, segments, activation)
    return result


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`: by the operator where it is fast, else by tiles."""
    meta, tensors, shape = prepared.meta, prepared.tensors, x.shape
    sequence = len(shape) == 3 and shape[0] == 1
    if not sequence and len(shape) != 2:
        y = multiply(x.reshape(x.numel() // shape[-1], shape[-1]), prepared, bias)
        return y.view(*shape[:-1], y.shape[1])
    flat = x.squeeze(0) if sequence else x
    if meta["pad"]:
        flat = torch.nn.functional.pad(flat, (0, meta["pad"]))
    y = _multiply_rows(flat, tensors["codes.0"], tensors["scales.0"], bias, meta["many"])
    return y.unsqueeze(0) if sequence else y


def multiply_stacked(x: torch.Tensor, runs: Runs, stack: Stack, bias: torch.Tensor | None) -> torch.Tensor:
    """
    Return `[P, N]` for x `[P, K]`, whose rows belong to one expert after the other.

    Args:
        x: in the problem's dtype.
        runs: experts, each with its number of rows.
        stack: experts of the layout.
        bias: `[E, N]` or None.
    """
    codes, scales, many = stack.views["codes.0"], stack.views["scales.0"], stack.meta["many"]
    if stack.meta["pad"]:
        x = torch.nn.functional.pad(x, (0, stack.meta["pad"]))
    return joined(
        [
            _multiply_rows(rows, codes[expert], scales[expert], None if bias is None else bias[expert], many)
            for (expert, _), rows in zip(runs, x.split([count for _, count in runs]), strict=True)
        ]
    )


def _multiply_rows(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, many: int
) -> torch.Tensor:
    """Return `[M, N]` for x `[M, K]`, K filled up: by the operator for less than `many` rows."""
    if 0 < x.shape[0] < many and not x.requires_grad:
        # The operator wants x contiguous, and takes no x without rows.
        y: torch.Tensor = _OPERATOR(x.contiguous(), codes, scales)
        return y if bias is None else y.add_(bias)
    if x.dtype == torch.bfloat16:
        return linear_by_rows(x, codes, scales, bias)
    bias = None if bias is None else bias.to(torch.float32)
    return linear_by_rows(x.to(torch.float32), codes, scales, bias).to(x.dtype)


def dequantize(prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
    """Return the values `[N, K]`."""
    codes, scales = prepared.tensors["codes.0"], _best_scales(prepared).to(torch.float32)
    values = torch.empty(codes.shape[0], prepared.problem.in_features, dtype=dtype)
    for begin, end in tiles(*codes.shape):
        exact = codes[begin:end, : values.shape[1]].to(torch.float32)
        values[begin:end] = exact.mul_(scales[begin:end].unsqueeze(1))
    return values


def unprepare(prepared: Prepared, kernel: str) -> tuple[Weight, ...]:
    """
    Return the canonical segments, bit by bit.

    Raises:
        NotImplementedError: scales were rounded to bfloat16 on the way in.
    """
    if "row_scales" not in prepared.tensors:
        refuse_rounded(prepared, kernel)
    codes, scales = prepared.tensors["codes.0"], _best_scales(prepared).unsqueeze(1)
    weights: list[Weight] = []
    row = 0
    for number, segment in enumerate(prepared.problem.segments):
        rows = slice(row, row + segment.out_features)
        row = rows.stop
        spec = segment.weight
        shared = slice(rows.start, rows.start + 1) if isinstance(spec.granularity, PerTensor) else rows
        weights.append(
            Weight(
                codes=codes[rows, : prepared.problem.in_features],
                scales=scales[shared].to(getattr(torch, spec.scale_dtype)),
                spec=spec,
                g_idx=prepared.tensors.get(f"g_idx.{number}"),
            )
        )
    return tuple(weights)


def _best_scales(prepared: Prepared) -> torch.Tensor:
    """Return the scales `[N]`, in float32 where x may be quantized."""
    exact = prepared.tensors.get("row_scales")
    return prepared.tensors["scales.0"] if exact is None else exact


def _copy_codes(segments: Sequence[Weight], out: torch.Tensor, inputs: int) -> None:
    """Fill `[N, K]` with codes of any stride, a piece of the inputs at a time."""
    out[:, inputs:] = 0
    step = max(STEP, _PIECE_BYTES // out.shape[0] // STEP * STEP)
    # Transposing out of memory whose rows are a power of two apart is slow: they compete for one place in the cache.
    scratch = torch.empty(min(step, inputs), out.shape[0] + 64, dtype=torch.int8)
    row = 0
    for weight in segments:
        target = out[row : row + weight.out_features]
        row += weight.out_features
        for begin in range(0, inputs, step):
            source = weight.codes[:, begin : min(begin + step, inputs)]
            if source.stride(1) != 1:
                copied = scratch[: source.shape[1], : source.shape[0]]
                source = copied.copy_(source.t()).t()
            target[:, begin : begin + source.shape[1]] = source


def _fake(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, scales, bias = inputs
    ctx.save_for_backward(codes, scales)
    ctx.dtype, ctx.bias = x.dtype, bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, torch.Tensor | None]:
    codes, scales = ctx.saved_tensors
    scaled = grad if scales is None else grad * scales.to(ctx.dtype)
    back = torch.mm(scaled, codes.to(ctx.dtype))
    return back, None, None, grad.sum(0) if ctx.bias else None


_OPERATOR = torch.ops.aten._weight_int8pack_mm.default
linear_by_rows = register(
    "rowwise_linear", "(Tensor x, Tensor codes, Tensor? scales, Tensor? bias) -> Tensor", rowwise_linear, _fake
)
differentiate("rowwise_linear", _keep_operands, _backward)
