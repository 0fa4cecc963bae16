"""Both kernels against the conformance class."""

from __future__ import annotations

from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestInt4Kernel(LinearKernelConformance):
    kernel = Int4Kernel()


class TestInt8Kernel(LinearKernelConformance):
    kernel = Int8Kernel()
