"""The kernels for mixtures of experts against the conformance class."""

from __future__ import annotations

from quantplug_cpu.experts import DenseExperts, Float4Experts, Int4Experts, Int8Experts, W8A8Experts
from quantplug_testkit.conformance.experts import MoEKernelConformance


class TestInt4Experts(MoEKernelConformance):
    kernel = Int4Experts()


class TestInt8Experts(MoEKernelConformance):
    kernel = Int8Experts()


class TestW8A8Experts(MoEKernelConformance):
    kernel = W8A8Experts()


class TestFloat4Experts(MoEKernelConformance):
    kernel = Float4Experts()


class TestDenseExperts(MoEKernelConformance):
    kernel = DenseExperts()
