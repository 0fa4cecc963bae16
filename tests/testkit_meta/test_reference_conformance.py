"""The two kernels that must pass everything against the conformance class."""

from __future__ import annotations

from quantplug.reference import ReferenceKernel
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.quantizing import QuantizingKernel


class TestReferenceKernel(LinearKernelConformance):
    kernel = ReferenceKernel()


class TestQuantizingKernel(LinearKernelConformance):
    kernel = QuantizingKernel()
