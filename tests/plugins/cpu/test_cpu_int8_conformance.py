"""The kernel for 8-bit weights against the conformance class."""

from __future__ import annotations

from quantplug_cpu.int8 import Int8Kernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestInt8Kernel(LinearKernelConformance):
    kernel = Int8Kernel()
