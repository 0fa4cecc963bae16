"""
The product as one operator of torch: x is quantized by a launch of our own, codes are multiplied by DeepGEMM.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import torch
import triton

from quantplug_deepgemm.device import quantize_groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.weight import Prepared

_FLOAT8 = torch.float8_e4m3fn
_WRITTEN: torch.dtype = torch.float32 if triton.knobs.runtime.interpret else _FLOAT8
"""What codes are written in: Triton's interpreter cuts off where it converts to 8-bit floats; torch converts then."""

_TOP, _LEAST = 448.0, torch.finfo(torch.float32).tiny
"""The largest code, and the smallest scale."""

_GROUP = 128
_GROUPS = 8
"""Groups of x that a program quantizes."""

_ALIGNED = 4
"""Scales of the same group are filled up to a multiple of this, or DeepGEMM copies them."""

_COMPILED = "nk"
"""
The sizes that DeepGEMM compiles for. Without them layers share its kernels, in some of which registers do not suffice:
those take three times as long, see README.md.
"""

_compiling = Lock()
"""DeepGEMM keeps what it compiled in a table that several threads must not change at once."""


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, meta = prepared.tensors, prepared.meta
    flat = x.reshape(-1, x.shape[-1])
    results, first = [], 0
    for number in range(meta["parts"]):
        rows = meta[f"rows.{number}"]
        part = None if bias is None else bias[first : first + rows]
        results.append(linear(flat, tensors[f"codes.{number}"], tensors[f"scales.{number}"], part, rows))
        first += rows
    y = results[0] if len(results) == 1 else torch.cat(results, dim=1)
    return y.view(*x.shape[:-1], prepared.problem.out_features)


def quantized(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[M, width]` of x `[M, K]` and float32 scales `[M, width / 128]`, those of a group together."""
    rows, inputs = x.shape
    step = -(-rows // _ALIGNED) * _ALIGNED
    codes = torch.empty(rows, width, dtype=_WRITTEN, device=x.device)
    scales = torch.empty(width // _GROUP, step, dtype=torch.float32, device=x.device)
    quantize_groups[(rows, triton.cdiv(width, _GROUP * _GROUPS))](
        x, codes, scales, inputs, width, step, *x.stride(),
        TOP=_TOP, LEAST=_LEAST, GROUPS=_GROUPS, GROUP=_GROUP, num_warps=4,
    )  # fmt: skip
    return codes.to(_FLOAT8), scales.t()[:rows]


def _linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, outputs)
    import deep_gemm

    filled, width = codes.shape
    with torch.cuda.device_of(x):
        y = x.new_empty(x.shape[0], filled)
        given = quantized(x, width)
        with _compiling:
            deep_gemm.fp8_gemm_nt(given, (codes, scales.t()), y, compiled_dims=_COMPILED)
        y = y if filled == outputs else y[:, :outputs].contiguous()
        return y if bias is None else y.add_(bias)


def _fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define(
        "quantplug_deepgemm::linear", "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int outputs) -> Tensor"
    )
    # On the CPU only a stand-in for DeepGEMM runs it, in tests.
    torch.library.impl("quantplug_deepgemm::linear", ("CUDA", "CPU"), _linear)
    torch.library.register_fake("quantplug_deepgemm::linear", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_deepgemm.linear.default
    return operator


linear = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` with x quantized, see `quantplug.rowlayout` for the tensors."""
