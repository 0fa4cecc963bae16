"""The Triton kernel for a quantized x against the conformance class, and what its sums of FP8 lose, on a GPU."""

from __future__ import annotations

import pytest
import torch

from quantplug.activations import read_activation
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerChannel, SegmentSpec, WeightSpec
from quantplug.weight import Weight
from quantplug_testkit.conformance import CATALOGUE, LinearKernelConformance
from quantplug_testkit.conformance.case import Case

pytest.importorskip("triton", reason="triton is not installed here")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_triton import w8a8launch  # needs triton
from quantplug_triton.w8a8 import TritonQuantizedKernel  # needs triton

KERNEL = TritonQuantizedKernel()


class TestTritonQuantizedKernel(LinearKernelConformance):
    kernel = KERNEL
    platform = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
    device = "cuda"


def layer(codes: torch.Tensor, permission: str, dtype: str):
    """Return a prepared layer whose scales are all 1."""
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
    problem = LinearProblem(
        codes.shape[1], (SegmentSpec(len(codes), spec),), dtype, activation=read_activation(permission, "here")
    )
    weight = Weight(codes.to(torch.float8_e4m3fn), torch.ones(len(codes), 1), spec)
    return KERNEL.prepare(problem, [weight], [None], torch.device("cuda"))


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_sums_of_many_small_products_do_not_get_lost_beside_a_large_one(rows: int) -> None:
    """A short accumulator drops what is 2^-14 of its sum or less; here that is a fifth of the result."""
    k, large = 4096, 256.0
    codes = torch.full((256, k), 2.0**-6)
    codes[:, 0], codes[:, 5] = 1.0, 0.0
    x = torch.full((rows, k), 1.0, device="cuda")
    # Column 5 brings each row's scale to 1, and is multiplied by 0.
    x[:, 0], x[:, 5] = large, 448.0
    y = KERNEL.apply(x, layer(codes, "float8_e4m3fn/token/dynamic", "float32"), None)
    small = 2.0**-6
    exact = large + (k - 2) * small
    within_a_chunk = 128 * small
    assert float((y - exact).abs().max()) <= within_a_chunk


@pytest.mark.parametrize(
    "family", ["x-float8-bias-odd-n-and-k", "x-float8_e5m2", "x-float8-ragged-groups-and-blocks", "x-mxfp8-mxfp4"]
)
def test_codes_that_are_lifted_give_the_product_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs that have no FP8, or one whose sums nobody has derived."""
    monkeypatch.setattr(w8a8launch, "multiplies_float8", lambda index: False)
    hazard = next(each for each in CATALOGUE if each.family == family and each.problem.dtype == "bfloat16")
    case = Case(KERNEL, Platform.parse("cuda:8.0"), torch.device("cuda"), hazard)
    for rows in (1, 17, 100):
        x = case.inputs(rows)
        case.check(x, case.apply(x), f"{rows} rows")


@pytest.mark.parametrize("permission", ["token/dynamic", "group128/dynamic", "tensor/dynamic"])
def test_x_is_quantized_alike_within_the_product_and_before_it(
    permission: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    codes = (torch.randn(320, 4096) * 8).to(torch.float8_e4m3fn).to(torch.float32)
    made = layer(codes, f"float8_e4m3fn/{permission}", "bfloat16")
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(w8a8launch, "_FUSED_BYTES", 1 << 40)
    within = KERNEL.apply(x, made, None)
    monkeypatch.setattr(w8a8launch, "_FUSED_BYTES", 0)
    assert torch.equal(KERNEL.apply(x, made, None), within)
