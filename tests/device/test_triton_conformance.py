"""The Triton kernel against the conformance class, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance import LinearKernelConformance

pytest.importorskip("triton", reason="triton is not installed here")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_triton.kernel import TritonKernel  # needs triton


class TestTritonKernel(LinearKernelConformance):
    kernel = TritonKernel()
    platform = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
    device = "cuda"
