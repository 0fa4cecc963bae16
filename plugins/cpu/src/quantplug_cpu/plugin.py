"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.kernel import LinearKernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[LinearKernel]:
    """Return the kernels, and the one for every format among them."""
    from quantplug_cpu.dense import DenseKernel
    from quantplug_cpu.float4 import Float4Kernel
    from quantplug_cpu.int4 import Int4Kernel
    from quantplug_cpu.int8 import Int8Kernel
    from quantplug_cpu.w8a8 import W8A8Kernel

    return [Int4Kernel(), Int8Kernel(), W8A8Kernel(), Float4Kernel(), DenseKernel()]
