"""The Triton kernel for experts against the conformance class, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance.experts import MoEKernelConformance

pytest.importorskip("triton", reason="triton is not installed here")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_triton.experts import TritonExperts  # needs triton


class TestTritonExperts(MoEKernelConformance):
    kernel = TritonExperts()
    platform = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
    device = "cuda"
