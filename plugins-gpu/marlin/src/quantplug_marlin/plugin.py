"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.kernel import LinearKernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[LinearKernel]:
    """Return the kernel for weights of any element type."""
    from quantplug_marlin.kernel import MarlinKernel

    return [MarlinKernel()]
