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
    Return humming's kernels for weights of 4 and 8 bits and x in 16, of linear layers and of experts, and those for
    experts whose file permits to quantize x to FP8: one that adds up precisely, and by request one that does not.
    """
    from quantplug_humming.experts import HummingExperts
    from quantplug_humming.float8experts import FastFloat8HummingExperts, Float8HummingExperts
    from quantplug_humming.kernel import HummingKernel

    return [HummingKernel(), HummingExperts(), Float8HummingExperts(), FastFloat8HummingExperts()]
