"""The CUDA C++ kernel for experts against the conformance class and torch's rules, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.platform import Platform
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_marlin import mixture
from quantplug_marlin.experts import MarlinExperts
from quantplug_testkit.conformance.experts.case import ExpertCase

KERNEL = MarlinExperts()
GPU = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
FAMILIES = {h.family: h for h in EXPERT_CATALOGUE if h.problem.dtype == "bfloat16"}


class TestMarlinExperts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


@pytest.mark.parametrize("family", ["tiles-int4-group128", "bias", "mxfp8"])
def test_the_operator_keeps_torchs_rules(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls, operator = ExpertCase(KERNEL, GPU, torch.device("cuda"), FAMILIES[family]), [], mixture.experts
    monkeypatch.setattr(mixture, "experts", lambda *given: calls.append(given) or operator(*given))
    case.apply(case.inputs(3), case.route(3))
    torch.library.opcheck(operator, calls[0])
