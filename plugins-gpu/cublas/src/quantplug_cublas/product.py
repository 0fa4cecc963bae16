"""
The product as one operator of torch: x is quantized, codes are multiplied, scales and bias are applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.seen import is_seen
from quantplug_cublas import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.weight import Prepared

try:
    from quantplug_cublas import launch
    from quantplug_cublas.launcher import INTERPRETED
except ImportError:  # Triton comes with torch on Linux only
    _LAUNCHES = False
else:
    _LAUNCHES = True

_ROWS = 4
"""M is filled up to a multiple of this for blocks, or cuBLAS refuses the product."""

_FEW_SUMS = 1 << 20
"""
Up to so many elements of y, scales per token and row of the weight are applied in a launch of their own: cuBLAS is
faster without them. See benchmarks/gpu/README.md.
"""

_MOST_ROWS = 65535
"""Rows that this launch has programs for."""


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None, *, fast: bool) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`; `fast` sums are never promoted to float32."""
    tensors, meta, activation = prepared.tensors, prepared.meta, prepared.problem.activation
    if activation is None:
        raise TypeError("prepared for a problem whose file does not permit to quantize x")
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    product = linear if is_seen(flat, bias) else linear_now
    how = activation.granularity, activation.element.value, fast
    one = tensors.get("one")
    if meta["parts"] == 1:
        weight = tensors["codes.0"], tensors["scales.0"], tensors.get("x_scale.0"), one
        y = product(flat, *weight, bias, meta["rows.0"], *how)
    else:
        results, first = [], 0
        for number in range(meta["parts"]):
            rows = meta[f"rows.{number}"]
            part = None if bias is None else bias[first : first + rows]
            weight = tensors[f"codes.{number}"], tensors[f"scales.{number}"], tensors.get(f"x_scale.{number}"), one
            results.append(product(flat, *weight, part, rows, *how))
            first += rows
        y = torch.cat(results, dim=1)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], prepared.problem.out_features)


def linear_now(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, x_scale: torch.Tensor | None,
    one: torch.Tensor | None, bias: torch.Tensor | None, outputs: int, shared: str, element: str,
    fast: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what the operator `linear` does."""
    rows, device = x.shape[0], x.get_device()
    if rows == 0:
        return x.new_empty(0, outputs)
    if device >= 0 and torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return linear_now(x, codes, scales, x_scale, one, bias, outputs, shared, element, fast)
    ways = launch if _LAUNCHES and (device >= 0 or INTERPRETED) else plain
    dtype, (filled, width) = getattr(torch, element), codes.shape
    if shared == "group":
        x_codes, x_scales = ways.by_groups(x, -(-rows // _ROWS) * _ROWS, width, dtype)
    elif shared == "token":
        x_codes, x_scales = ways.by_tokens(x, width, dtype)
    else:
        x_scales = _scale_of(x, dtype) if x_scale is None else x_scale
        x_codes = ways.by_scale(x, x_scales, width, dtype)
    if shared != "group" and (x_scales.numel() > 1 or scales.numel() > 1):
        if one is not None and rows <= _MOST_ROWS and rows * outputs <= _FEW_SUMS:
            sums = torch._scaled_mm(x_codes, codes.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast)
            small: torch.Tensor = ways.scaled(sums, x_scales, scales, bias, outputs, x.dtype)
            return small
        x_scales = x_scales.expand(rows, 1).contiguous()
        scales = scales.expand(1, filled).contiguous()
    # cuBLAS adds a bias before it rounds, but none to a float32 product, where rounding twice is no worse.
    exact = x.dtype == torch.float32
    within = None if bias is None or exact else torch.nn.functional.pad(bias, (0, filled - outputs))
    y = torch._scaled_mm(
        x_codes, codes.t(), x_scales, scales, bias=within, out_dtype=x.dtype, use_fast_accum=fast
    )  # fmt: skip
    if y.shape != (rows, outputs):
        y = y[:rows, :outputs].contiguous()
    return y.add_(bias) if bias is not None and exact else y


def _scale_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 `[1]`, the scale of all of x."""
    info = torch.finfo(torch.float32)
    return (x.abs().amax().to(torch.float32) / torch.finfo(dtype).max).clamp_(min=info.tiny).reshape(1)


def _fake(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, x_scale: torch.Tensor | None,
          one: torch.Tensor | None, bias: torch.Tensor | None, outputs: int, *how: object) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define(
        "quantplug_cublas::linear",
        "(Tensor x, Tensor codes, Tensor scales, Tensor? x_scale, Tensor? one, Tensor? bias, int outputs, str shared, "
        "str element, bool fast) -> Tensor",
    )
    # torch has the product on the CPU, too, which is what the tests there use.
    torch.library.impl("quantplug_cublas::linear", ("CUDA", "CPU"), linear_now)
    torch.library.register_fake("quantplug_cublas::linear", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_cublas.linear.default
    return operator


linear = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` with x quantized, see `quantplug.rowlayout` for the tensors."""
