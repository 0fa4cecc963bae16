"""The CUDA C++ kernel against the conformance class, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance import LinearKernelConformance

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_marlin.kernel import MarlinKernel  # the operators it registers need a CUDA build of torch


class TestMarlinKernel(LinearKernelConformance):
    kernel = MarlinKernel()
    platform = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
    device = "cuda"
