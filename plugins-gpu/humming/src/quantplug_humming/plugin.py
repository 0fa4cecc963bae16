"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.kernel import LinearKernel

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_kernels() -> list[LinearKernel]:
    """Return humming's kernel for weights of 4 and 8 bits and x in 16."""
    from quantplug_humming.kernel import HummingKernel

    return [HummingKernel()]
