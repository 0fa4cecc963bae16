"""The cuBLAS kernels against the conformance class, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_cublas.kernel import CublasKernel, FastCublasKernel
from quantplug_testkit.conformance import LinearKernelConformance

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

_ARCH = "{}.{}".format(*torch.cuda.get_device_capability())
if _ARCH not in {"8.9", "9.0"}:
    pytest.skip(f"needs a GPU of compute capability 8.9 or 9.0; here it is {_ARCH}", allow_module_level=True)


class TestCublasKernel(LinearKernelConformance):
    kernel = CublasKernel()
    platform = Platform.parse(f"cuda:{_ARCH}")
    device = "cuda"


class TestFastCublasKernel(LinearKernelConformance):
    kernel = FastCublasKernel()
    platform = Platform.parse(f"cuda:{_ARCH}")
    device = "cuda"
