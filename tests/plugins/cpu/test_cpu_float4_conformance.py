"""The kernel for 4-bit floating-point weights against the conformance class."""

from __future__ import annotations

from quantplug_cpu.float4 import Float4Kernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestFloat4Kernel(LinearKernelConformance):
    kernel = Float4Kernel()
