"""
Registration of this plugin's own operators, so that torch.compile sees each as one call and gradients flow through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def register(
    name: str,
    schema: str,
    function: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """
    Register a CPU operator `quantplug_cpu::name` and return it.

    Args:
        name: unique in this package.
        schema: arguments and result in torch's notation.
        function: the implementation.
        fake: returns an empty tensor of the result's shape and dtype.
    """
    qualified = f"quantplug_cpu::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CPU", function)
    torch.library.register_fake(qualified, fake)
    operator: Callable[..., torch.Tensor] = getattr(torch.ops.quantplug_cpu, name).default
    return operator


def differentiate(
    name: str, keep: Callable[[Any, tuple[Any, ...], torch.Tensor], None], backward: Callable[..., Any]
) -> None:
    """Give a registered operator its gradient: `keep` saves what `backward` needs."""
    torch.library.register_autograd(f"quantplug_cpu::{name}", backward, setup_context=keep)
