"""
Launches of a kernel that Triton has compiled, past the questions that Triton asks at every call.

A call of a `triton.jit` function finds out each time what it was compiled for: it binds arguments to names, sorts them
by what code may depend on, spells all of that out, and looks whether globals have changed. That takes longer than the
launch. What was compiled can be launched by itself, as Triton's own tutorials do: with all arguments, constants, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs kernels, which compiles nothing."""

_ALIGNED = 16
"""Triton has code of its own for addresses that are multiples of this."""

_KNOWN = 4096
"""Kinds of calls that a launcher remembers before it begins anew."""


def kind(tensor: torch.Tensor) -> tuple[torch.dtype, int]:
    """Return what the code for a tensor depends on; of one that was allocated for the call, the dtype is enough."""
    return tensor.dtype, tensor.data_ptr() % _ALIGNED


class Launcher:
    """
    Launches of a kernel with some constants.

    Args:
        kernel: a `triton.jit` function whose arguments are tensors, then whole numbers, then constants, all of
            them given by their places.
        warps: of a program.
        constants: in the order of the arguments.
    """

    __slots__ = ("_compiled", "_constants", "_kernel", "_values", "_warps")

    def __init__(self, kernel: Any, warps: int, **constants: object) -> None:
        self._kernel, self._warps, self._constants = kernel, warps, constants
        self._values = tuple(constants.values())
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: int,
        kinds: Hashable,
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[int, ...],
    ) -> None:
        """
        Launch on the current stream.

        Args:
            grid: programs.
            device: the current one, where tensors lie; -1 for the CPU.
            kinds: what the code depends on besides device, numbers and constants: which tensors are None, and the
                `kind` of others, as far as it may differ between calls.
            tensors: the kernel's.
            numbers: the kernel's.
        """
        key = device, kinds, numbers
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *self._values, stream=driver.active.get_current_stream(device))
            return
        made = self._kernel[grid](*tensors, *numbers, **self._constants, num_warps=self._warps)
        if not INTERPRETED:
            if len(self._compiled) >= _KNOWN:
                self._compiled.clear()
            self._compiled[key] = made
