"""The kernels for experts that must pass everything against the conformance class."""

from __future__ import annotations

from quantplug_testkit.conformance.experts import MoEKernelConformance
from quantplug_testkit.plain_experts import PlainExperts, QuantizingExperts


class TestPlainExperts(MoEKernelConformance):
    kernel = PlainExperts()


class TestQuantizingExperts(MoEKernelConformance):
    kernel = QuantizingExperts()
