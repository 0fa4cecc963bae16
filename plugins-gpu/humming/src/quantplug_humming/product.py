"""
The product as one operator of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_humming.choice import choose
from quantplug_humming.form import Form
from quantplug_humming.locks import locks
from quantplug_humming.prepare import layer_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.weight import Prepared


_VECTOR = 16


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, meta = prepared.tensors, prepared.meta
    y = linear(
        x.reshape(-1, x.shape[-1]),
        tensors["weight"],
        tensors["weight_scale"],
        tensors.get("zero_point"),
        None if bias is None else bias.index_select(0, tensors["bias_order"]),
        [meta[name] for name in Form._fields],
    )
    return y.view(*x.shape[:-1], meta["outputs"])


def widened(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Return x `[M, K]` on dense memory, aligned to 16 bytes, filled up with zeros to so many columns."""
    if columns > x.shape[1]:
        return torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    x = x.contiguous()
    return x if x.data_ptr() % _VECTOR == 0 else x.clone()


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    bias: torch.Tensor | None, facts: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    form = Form(*facts)
    if x.shape[0] == 0:
        return x.new_empty(0, form.outputs)
    from humming.ops import humming_gemm

    config = layer_config(form, bias=bias is not None)
    choice = choose(form, bias is not None, 0, x.shape[0], x.device.index or 0)
    y: torch.Tensor = humming_gemm(
        layer_config=config.to_str(),
        inputs=widened(x, config.shape_k - config.pad_shape_k),
        weight=weight,
        weight_scale=scales,
        zero_point=zeros,
        bias=bias,
        locks=locks(x.device),
        tuning_config=choice.tuning,
    )
    return y if y.shape[1] == form.outputs else y[:, : form.outputs].contiguous()


def _fake(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
          bias: torch.Tensor | None, facts: Sequence[int]) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], Form(*facts).outputs)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define(
        "quantplug_humming::linear",
        "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int[] facts) -> Tensor",
    )
    # On the CPU only a stand-in for humming runs it, in tests.
    torch.library.impl("quantplug_humming::linear", ("CUDA", "CPU"), _linear)
    torch.library.register_fake("quantplug_humming::linear", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_humming.linear.default
    return operator


linear = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` through humming, bias in its order, see `prepare.py` for the tensors."""
