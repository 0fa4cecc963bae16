"""The kernel for every format against the conformance class."""

from __future__ import annotations

from quantplug_cpu.dense import DenseKernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestDenseKernel(LinearKernelConformance):
    kernel = DenseKernel()
