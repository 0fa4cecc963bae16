"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.moekernel import Kernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[Kernel]:
    """
    Return the kernels for FP8 weights whose file permits to quantize x to FP8, of linear layers and of experts: those
    that add up precisely, and by request those that do not.
    """
    from quantplug_cublas.experts import CublasExperts, FastCublasExperts
    from quantplug_cublas.kernel import CublasKernel, FastCublasKernel

    return [CublasKernel(), FastCublasKernel(), CublasExperts(), FastCublasExperts()]
