"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.moekernel import Kernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[Kernel]:
    """Return the kernel for linear layers with FP8 weights in blocks whose file permits to quantize x to FP8."""
    from quantplug_deepgemm.kernel import DeepGemmKernel

    return [DeepGemmKernel()]
