"""The kernel for 2-, 3- and 4-bit weights against the conformance class."""

from __future__ import annotations

from quantplug_cpu.int4 import Int4Kernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestInt4Kernel(LinearKernelConformance):
    kernel = Int4Kernel()
