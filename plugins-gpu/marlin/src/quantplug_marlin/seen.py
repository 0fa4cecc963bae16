"""
Who would see an operator of torch that is called: where nobody does, what it does is done at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug import seen

if TYPE_CHECKING:
    import torch


def is_seen(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """
    Whether somebody would see an operator that is given x and a bias, or x does not lie on a GPU.

    Raises:
        NotImplementedError: x or the bias carries a tangent, which no operator here passes on.
    """
    refuse_tangents(x, bias)
    return seen.is_seen(x, bias) or not x.is_cuda


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """
    Say of forward-mode differentiation that it ends here, to who calls a kernel without a layer, which says so itself.

    Raises:
        NotImplementedError: a tensor carries a tangent.
    """
    if seen.carries_tangent(*(tensor for tensor in tensors if tensor is not None)):
        raise NotImplementedError(
            "quantplug_marlin has no derivatives for forward-mode differentiation, and x, or what it is multiplied "
            "with, carries a tangent"
        )
