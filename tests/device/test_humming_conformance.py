"""The humming kernel against the conformance class, on a GPU where the package is installed."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_humming.kernel import HummingKernel
from quantplug_testkit.conformance import LinearKernelConformance

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

pytest.importorskip("humming", reason="humming-kernels is not installed here", exc_type=ImportError)


class TestHummingKernel(LinearKernelConformance):
    kernel = HummingKernel()
    platform = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
    device = "cuda"
