"""
Who would notice an operator of torch that is called, and who would lose a tangent by it.

Torch's way to an operator's implementation in Python takes as long on the host as a small product does on a GPU. A
kernel that registers an operator may do at once what it does, where nobody would see the operator.
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
    Return whether somebody would see an operator that is given x and a bias beside weights.

    Operators are seen by torch's compiler, gradients, modes, transformations and its tracer, by subclasses of tensors,
    and on the meta device.
    """
    return (
        is_compiling()
        or type(x) is not torch.Tensor
        or x.requires_grad
        or x.is_meta
        or (bias is not None and (type(bias) is not torch.Tensor or bias.requires_grad))
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transformation() is not None
        or _tracer() is not None
    )


def carries_tangent(*tensors: torch.Tensor) -> bool:
    """
    Return whether a tensor carries a tangent of forward-mode differentiation.

    Torch refuses it where an operator of its own has no rule for it; those of a library run as if there were none.
    """
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
