"""The humming kernel for experts against the conformance class, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance.experts import MoEKernelConformance

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

pytest.importorskip("humming", reason="humming-kernels is not installed here", exc_type=ImportError)
pytest.importorskip("triton", reason="triton is not installed here")

from quantplug_humming.experts import HummingExperts


class TestHummingExperts(MoEKernelConformance):
    kernel = HummingExperts()
    platform = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
    device = "cuda"
