"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.moekernel import Kernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[Kernel]:
    """Return the kernel for weights of any element type, the one for a quantized x, and the one for experts."""
    from quantplug_triton.experts import TritonExperts
    from quantplug_triton.kernel import TritonKernel
    from quantplug_triton.w8a8 import TritonQuantizedKernel

    return [TritonKernel(), TritonQuantizedKernel(), TritonExperts()]
