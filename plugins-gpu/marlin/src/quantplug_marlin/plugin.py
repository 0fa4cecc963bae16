"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.moekernel import Kernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[Kernel]:
    """Return the kernels for linear layers, also in the layout of products in FP8, and for experts, also in FP8."""
    from quantplug_marlin.experts import MarlinExperts
    from quantplug_marlin.float8experts import MarlinFloat8Experts
    from quantplug_marlin.kernel import MarlinKernel
    from quantplug_marlin.rowkernel import MarlinRowsKernel

    return [MarlinKernel(), MarlinRowsKernel(), MarlinExperts(), MarlinFloat8Experts()]
