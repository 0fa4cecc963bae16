"""The reference kernel against the conformance class: the one kernel that must pass everything."""

from __future__ import annotations

from quantplug.reference import ReferenceKernel
from quantplug_testkit.conformance import LinearKernelConformance


class TestReferenceKernel(LinearKernelConformance):
    kernel = ReferenceKernel()
