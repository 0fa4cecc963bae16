"""
Who would see an operator of torch that is called: where nobody does, what it does is done at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from collections.abc import Callable


def _unknown() -> int:
    """Stand in for a question that this torch cannot be asked: somebody may see operators."""
    return 1


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _unknown)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", _unknown)
_transformation: Callable[[], object] = getattr(torch._C._functorch, "peek_interpreter_stack", _unknown)
_tracer: Callable[[], object] = getattr(torch._C, "_get_tracing_state", _unknown)


def is_seen(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """
    Whether somebody would see an operator that is given x and a bias.

    Torch's way to an operator's implementation in Python takes as long on the host as a small product on the GPU.
    Operators are seen by its compiler, gradients, modes, transformations and its tracer, and by subclasses of tensors.

    Raises:
        NotImplementedError: x or the bias carries a tangent, which no operator here passes on.
    """
    refuse_tangents(x, bias)
    return (
        is_compiling()
        or type(x) is not torch.Tensor
        or not x.is_cuda
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transformation() is not None
        or _tracer() is not None
    )


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """
    Say of forward-mode differentiation that it ends here.

    Torch says so of operators of its own only: those of a library run as if there were no tangents.

    Raises:
        NotImplementedError: a tensor carries a tangent.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "quantplug_marlin has no derivatives for forward-mode differentiation, and x, or what it is multiplied "
            "with, carries a tangent"
        )
