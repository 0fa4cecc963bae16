"""
Which kernel of a layer serves a call, by its number of rows; and a layer's call as one operator, for compiled models.

The shape of x alone decides: nothing waits for a device. A model compiled for any number of rows would be compiled once
more for every range of them, and torch would look into `dequantize`, which may be any code; there the whole call is one
operator that decides inside. Everywhere else a layer calls its kernels itself, which is cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantplug.dense import DenseProduct, dequantizes
from quantplug.weight import Prepared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.kernel import LinearKernel
    from quantplug.spec import LinearProblem

    Choices = tuple[tuple[int | None, LinearKernel], ...]


K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Layout:
    """
    One layout in which a layer is held.

    Attributes:
        layout_id: its name.
        names: of its tensors.
        meta: its plain facts.
    """

    layout_id: str
    names: tuple[str, ...]
    meta: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """
    All that a call of a layer needs besides tensors.

    Attributes:
        choices: the most rows that each kernel serves, None for the last, by rising rows.
        problem: what they were prepared for.
        layouts: those that the kernels read, in the order of their tensors.
    """

    choices: Choices
    problem: LinearProblem
    layouts: tuple[Layout, ...]

    def prepared(self, kernel: LinearKernel, tensors: list[torch.Tensor]) -> Prepared:
        """Return the layer in a kernel's layout."""
        first = 0
        for layout in self.layouts:
            last = first + len(layout.names)
            if layout.layout_id == kernel.layout_id:
                named = dict(zip(layout.names, tensors[first:last], strict=True))
                return Prepared(layout.layout_id, self.problem, named, dict(layout.meta))
            first = last
        raise LookupError(f"{kernel.name} reads {kernel.layout_id}, which is not held")


_CALLS: list[Call] = []
_NUMBERS: dict[Call, int] = {}


def kernel_for(choices: Sequence[tuple[int | None, K]], rows: int) -> K:
    """Return the kernel that serves M = `rows`; `choices` as in `Call`, of either kind of kernel."""
    for most, kernel in choices:
        if most is None or rows <= most:
            return kernel
    return choices[-1][1]


def known_kernel(choices: Choices, rows: int) -> LinearKernel | None:
    """Return the kernel that serves M = `rows` in the graph that is being compiled; None where that is not fixed."""
    for most, kernel in choices:
        if most is None or statically_known_true(rows <= most):
            # Its own code is for torch.compile to look into, but that of a dense product ends in `dequantize`.
            return None if isinstance(kernel, DenseProduct) else kernel
        if not statically_known_true(rows > most):
            return None
    return None


def number_of(choices: Choices, held: Sequence[Prepared]) -> int:
    """
    Return the number by which `run` knows a call; layers that differ in nothing but their tensors share one.

    Args:
        choices: as in `Call`.
        held: the layer in each layout that the kernels read; `run` takes their tensors in this order.
    """
    layouts = tuple(Layout(one.layout_id, tuple(one.tensors), tuple(sorted(one.meta.items()))) for one in held)
    call = Call(choices, held[0].problem, layouts)
    number = _NUMBERS.setdefault(call, len(_CALLS))
    if number == len(_CALLS):
        _CALLS.append(call)
    return number


def _run(x: torch.Tensor, bias: torch.Tensor | None, tensors: list[torch.Tensor], call: int) -> torch.Tensor:
    wanted = _CALLS[call]
    kernel = kernel_for(wanted.choices, x.numel() // wanted.problem.in_features)
    return kernel.apply(x, wanted.prepared(kernel, tensors), bias).contiguous()


def _fake(x: torch.Tensor, bias: torch.Tensor | None, tensors: list[torch.Tensor], call: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], _CALLS[call].problem.out_features)


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, tensors, call = inputs
    ctx.save_for_backward(*tensors)
    ctx.call, ctx.dtype, ctx.bias = call, x.dtype, bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, list[None], None]:
    wanted, tensors = _CALLS[ctx.call], list(ctx.saved_tensors)
    kernel = next((kernel for _, kernel in wanted.choices if dequantizes(kernel)), wanted.choices[0][1])
    values = kernel.dequantize(wanted.prepared(kernel, tensors), ctx.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    return grad @ values, rows.sum(0) if ctx.bias else None, [None] * len(tensors), None


_NAME = "quantplug::linear"
torch.library.define(_NAME, "(Tensor x, Tensor? bias, Tensor[] tensors, int call) -> Tensor")
torch.library.impl(_NAME, "default", _run)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_keep_operands)

run = torch.ops.quantplug.linear.default
"""`run(x, bias, tensors, call)`: y `[..., N]` for x `[..., K]` by the kernel for its rows; `call` from `number_of`."""
