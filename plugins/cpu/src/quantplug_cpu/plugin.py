"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.moekernel import Kernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[Kernel]:
    """Return the kernels for linear layers and for experts, with one for every format among each."""
    from quantplug_cpu.dense import DenseKernel
    from quantplug_cpu.experts import DenseExperts, Float4Experts, Int4Experts, Int8Experts, W8A8Experts
    from quantplug_cpu.float4 import Float4Kernel
    from quantplug_cpu.int4 import Int4Kernel
    from quantplug_cpu.int8 import Int8Kernel
    from quantplug_cpu.w8a8 import W8A8Kernel

    return [
        *(Int4Kernel(), Int8Kernel(), W8A8Kernel(), Float4Kernel(), DenseKernel()),
        *(Int4Experts(), Int8Experts(), W8A8Experts(), Float4Experts(), DenseExperts()),
    ]
