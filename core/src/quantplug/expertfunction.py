"""
The function between the two products of an expert, in plain torch operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from quantplug.moe import ExpertFunction, FunctionName


def between(product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
    """
    Return f of a first product, computed in float32 and rounded once to the product's dtype.

    Args:
        product: `[M, 2I]`, gate then up; without a gate `[M, I]`.
        function: what f is.
    """
    values = product.to(torch.float32)
    if not function.gated:
        return _named(values, function.name, function.alpha).to(product.dtype)
    gate, up = values.chunk(2, dim=-1)
    if function.limit is not None:
        gate = gate.clamp(max=function.limit)
        up = up.clamp(-function.limit, function.limit)
    if function.up_offset:
        up = up + function.up_offset
    return (_named(gate, function.name, function.alpha) * up).to(product.dtype)


def _named(z: torch.Tensor, name: FunctionName, alpha: float) -> torch.Tensor:
    match name:
        case "silu":
            return torch.nn.functional.silu(z) if alpha == 1 else z * torch.sigmoid(alpha * z)
        case "gelu":
            return torch.nn.functional.gelu(z)
        case "gelu_tanh":
            return torch.nn.functional.gelu(z, approximate="tanh")
        case "relu":
            return torch.relu(z)
        case "relu2":
            return torch.relu(z).square()
