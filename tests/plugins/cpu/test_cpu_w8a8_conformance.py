"""The kernel that quantizes x against the conformance class."""

from __future__ import annotations

from quantplug_cpu.w8a8 import W8A8Kernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestW8A8Kernel(LinearKernelConformance):
    kernel = W8A8Kernel()
