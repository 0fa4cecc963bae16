"""The DeepGEMM kernel against the conformance class, on a GPU where the package is installed."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_deepgemm.kernel import DeepGemmKernel
from quantplug_testkit.conformance import LinearKernelConformance

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

pytest.importorskip("deep_gemm", reason="sgl-deep-gemm is not installed here", exc_type=ImportError)


class TestDeepGemmKernel(LinearKernelConformance):
    kernel = DeepGemmKernel()
    platform = Platform.parse("cuda:9.0")
    device = "cuda"
