"""
The product as one operator of torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.seen import is_seen
from quantplug_humming.choice import choose
from quantplug_humming.form import Form
from quantplug_humming.locks import locks
from quantplug_humming.prepare import layer_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.weight import Prepared


_VECTOR = 16


class Way(NamedTuple):
    """
    How a product is launched.

    Attributes:
        kernels: int64, what humming's launcher knows a compiled kernel by.
        columns: of x.
    """

    kernels: torch.Tensor
    columns: int


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, meta = prepared.tensors, prepared.meta
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    product = linear if is_seen(flat, bias) else linear_now
    y = product(
        flat,
        tensors["weight"],
        tensors["weight_scale"],
        tensors.get("zero_point"),
        None if bias is None else bias.index_select(0, tensors["bias_order"]),
        [meta[name] for name in Form._fields],
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], meta["outputs"])


def widened(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Return x `[M, K]` on dense memory, aligned to 16 bytes, filled up with zeros to so many columns."""
    if columns > x.shape[1]:
        return torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    x = x.contiguous()
    return x if x.data_ptr() % _VECTOR == 0 else x.clone()


@lru_cache(maxsize=4096)
def way(form: Form, bias: bool, rows: int, device: int) -> Way:
    """
    Return how a product is launched, with its kernel compiled: what humming's own call would look up each time.

    Args:
        form: of the weight.
        bias: whether there is one.
        rows: of x, at least 1.
        device: index of the GPU.
    """
    from humming.kernel.humming import HummingKernel

    config, choice = layer_config(form, bias=bias), choose(form, bias, 0, rows, device)
    kernels = HummingKernel.prepare_kernels(config.to_str(), None, choice.tuning, device)
    return Way(kernels, config.shape_k - config.pad_shape_k)


def linear_now(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    bias: torch.Tensor | None, facts: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """Do what the operator `linear` does."""
    form, rows = Form(*facts), x.shape[0]
    if rows == 0:
        return x.new_empty(0, form.outputs)
    kernels, columns = way(form, bias is not None, rows, max(0, x.get_device()))
    # As `humming.ops.launch_kernel` calls it, which takes 11 us more on the way.
    y: torch.Tensor = torch.ops.humming.launch_kernel.default(
        kernels, widened(x, columns), weight, scales, None, None, None, zeros, bias, None, None, None, None, None,
        locks(x.device), 1, 0,
    )  # fmt: skip
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
    torch.library.impl("quantplug_humming::linear", ("CUDA", "CPU"), linear_now)
    torch.library.register_fake("quantplug_humming::linear", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_humming.linear.default
    return operator


linear = _register()
"""`y [M, N] = x [M, K] @ W^T + bias` through humming, bias in its order, see `prepare.py` for the tensors."""
