"""
The product as one operator of torch, and the choice of humming's kernel by the number of rows.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from quantplug_humming.locks import locks
from quantplug_humming.prepare import layer_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.weight import Prepared


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, problem = prepared.tensors, prepared.problem
    y = linear(
        x.reshape(-1, x.shape[-1]),
        tensors["weight"],
        tensors["weight_scale"],
        tensors.get("zero_point"),
        bias,
        problem.out_features,
        layer_config(problem, bias=bias is not None).to_str(),
    )
    return y.view(*x.shape[:-1], problem.out_features)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    bias: torch.Tensor | None, outputs: int, layer: str,
) -> torch.Tensor:  # fmt: skip
    if x.shape[0] == 0:
        return x.new_empty(0, outputs)
    from humming.ops import humming_gemm
    from humming.transform import transform_humming_bias

    config = _config(layer)
    if bias is not None:
        bias = transform_humming_bias(torch.nn.functional.pad(bias, (0, config.shape_n - outputs)))
    inputs = config.shape_k - config.pad_shape_k
    y: torch.Tensor = humming_gemm(
        layer_config=layer,
        inputs=torch.nn.functional.pad(x, (0, inputs - x.shape[1])).contiguous(),
        weight=weight,
        weight_scale=scales,
        zero_point=zeros,
        bias=bias,
        locks=locks(x.device),
        tuning_config=_tuning(layer, x.shape[0], x.device.index),
    )
    return y if y.shape[1] == outputs else y[:, :outputs].contiguous()


@cache
def _config(layer: str) -> Any:
    from humming.config import LayerConfig

    return LayerConfig(**json.loads(layer))


@cache
def _ranges(layer: str, device: int) -> tuple[tuple[int, str], ...]:
    """Return humming's choices: up to so many rows, this kernel."""
    from humming.tune import get_heuristics_config

    choices = get_heuristics_config(_config(layer), device=device)
    return tuple((int(last), json.dumps(kernel)) for _, last, kernel in choices)


@cache
def _tuning(layer: str, rows: int, device: int) -> str:
    """Return humming's choice for a number of rows; only what is used is compiled."""
    return next(kernel for last, kernel in _ranges(layer, device) if rows <= last)


def _fake(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
          bias: torch.Tensor | None, outputs: int, layer: str) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define(
        "quantplug_humming::linear",
        "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int outputs, str layer) -> Tensor",
    )
    torch.library.impl("quantplug_humming::linear", "CUDA", _linear)
    torch.library.register_fake("quantplug_humming::linear", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_humming.linear.default
    return operator


linear = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` through humming, see `prepare.py` for the tensors."""
