"""The cuBLAS kernel on a GPU beyond the conformance class: what sums lose, large layers, graphs, streams, both ways."""

from __future__ import annotations

import pytest
import torch
from device_checks import check_two_streams

from quantplug.activations import read_activation
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug.weight import Weight
from quantplug_cublas import plain, product
from quantplug_cublas.kernel import CublasKernel

launch = pytest.importorskip("quantplug_cublas.launch", reason="triton is not installed here", exc_type=ImportError)
KERNEL = CublasKernel()
FLOAT8 = torch.float8_e4m3fn
MODES = {
    "tensor": (PerTensor(), "float8_e4m3fn/tensor/dynamic"),
    "one scale": (PerTensor(), "float8_e4m3fn/token/dynamic"),
    "row": (PerChannel(), "float8_e4m3fn/token/dynamic"),
    "block": (PerBlock(128, 128), "float8_e4m3fn/group128/dynamic"),
}


@pytest.fixture(autouse=True)
def hopper(cuda: torch.device) -> torch.device:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return cuda


def layer(mode: str, codes: torch.Tensor, dtype: str = "bfloat16"):
    """Return a prepared layer whose scales are all 1."""
    granularity, permission = MODES[mode]
    (n, k), spec = codes.shape, WeightSpec(ElementType.FLOAT8_E4M3FN, granularity, "float32")
    shape = {"tensor": (1, 1), "one scale": (1, 1), "row": (n, 1), "block": (-(-n // 128), -(-k // 128))}[mode]
    problem = LinearProblem(k, (SegmentSpec(n, spec),), dtype, activation=read_activation(permission, "here"))
    return KERNEL.prepare(problem, [Weight(codes.cpu(), torch.ones(shape), spec)], [None], torch.device("cuda"))


def random_codes(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    octets = torch.randint(0, 256, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
    return (octets & 0xBF).view(FLOAT8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "n"), [(1, 256), (16, 4096), (512, 4096)])
def test_sums_lose_what_is_far_below_a_product_of_the_same_128_inputs_only(mode: str, rows: int, n: int) -> None:
    """What the bound of the cast "accumulator" stands on: 13 bits behind the leading one, and then float32."""
    k, place = 1024, 300
    codes = torch.full((n, k), 2.0**-8, device="cuda")
    # The largest code of each group of x, by which the scale is 1, is multiplied by 0.
    codes[:, ::128], codes[:, place] = 0, 1
    made = layer(mode, codes.to(FLOAT8), "float32")
    for bits in (13, 14):
        lost = []
        for block in range(0, k, 128):
            without = torch.zeros(rows, k, device="cuda")
            without[:, ::128], without[:, place] = 448, 256
            x = without.clone()
            x[:, block + 77] = 2.0 ** (16 - bits)
            more = KERNEL.apply(x, made, None) - KERNEL.apply(without, made, None)
            wanted = 2.0 ** (8 - bits)
            lost.append(bool((more == 0).all()))
            assert lost[-1] or bool(((more - wanted).abs() < wanted / 256).all())
        assert lost == [bits > 13 and block <= place < block + 128 for block in range(0, k, 128)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3, 64, 300, 2048])
def test_layers_of_real_sizes_are_near_the_float64_product(mode: str, rows: int) -> None:
    n, k = 4096, 14336
    codes = random_codes(n, k)
    made = layer(mode, codes)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    if mode == "block":
        x_codes, scales = plain.by_groups(x, rows, k, FLOAT8)
        right = x_codes.double() * scales.double().repeat_interleave(128, 1)
    elif mode == "tensor":
        scale = x.abs().max().float() / 448
        right = plain.by_scale(x, scale, k, FLOAT8).double() * scale.double()
    else:
        x_codes, scales = plain.by_tokens(x, k, FLOAT8)
        right = x_codes.double() * scales.double()
    wanted = right @ codes.double().t()
    y = KERNEL.apply(x, made, None).double()
    assert float((y - wanted).norm() / wanted.norm()) < 2**-8


@pytest.mark.parametrize("rows", [1, 2, 128, 5000])
@pytest.mark.parametrize("k", [96, 4096, 40000])
def test_both_ways_to_quantize_x_give_the_same_codes(rows: int, k: int) -> None:
    """But for quotients that roundings carry across the middle between two codes."""
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) * torch.rand(rows, 1, device="cuda").bfloat16()
    width, filled = -(-k // 512) * 512, -(-rows // 4) * 4
    scale = torch.tensor([0.004], device="cuda")
    pairs = [
        (launch.by_tokens(x, width, FLOAT8), plain.by_tokens(x, width, FLOAT8)),
        (launch.by_groups(x, filled, width, FLOAT8), plain.by_groups(x, filled, width, FLOAT8)),
        ((launch.by_scale(x, scale, width, FLOAT8), scale), (plain.by_scale(x, scale, width, FLOAT8), scale)),
    ]
    for (codes, scales), (other_codes, other_scales) in pairs:
        assert torch.allclose(scales, other_scales, rtol=2**-22, atol=0)
        apart = (codes.view(torch.uint8).int() - other_codes.view(torch.uint8).int()).abs()
        assert int(apart.max()) <= 1
        assert int((apart > 0).sum()) <= 2 + codes.numel() // 10_000


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_gives_what_plain_calls_give_also_for_other_inputs(mode: str) -> None:
    made = layer(mode, random_codes(320, 576))
    for rows in (1, 17):
        x = torch.randn(rows, 576, dtype=torch.bfloat16, device="cuda")
        KERNEL.apply(x, made, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = KERNEL.apply(x, made, None)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, KERNEL.apply(x, made, None))


@pytest.mark.parametrize("mode", MODES)
def test_two_streams_at_once_do_not_disturb_each_other(mode: str) -> None:
    made = layer(mode, random_codes(320, 576))
    check_two_streams(KERNEL, made, lambda: torch.randn(3, 576, dtype=torch.bfloat16, device="cuda"))


def test_the_plain_way_serves_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {mode: layer(mode, random_codes(320, 576)) for mode in MODES}
    x = torch.randn(5, 576, dtype=torch.bfloat16, device="cuda")
    with_triton = {mode: KERNEL.apply(x, made[mode], None).float() for mode in MODES}
    monkeypatch.setattr(product, "_LAUNCHES", False)
    for mode, wanted in with_triton.items():
        y = KERNEL.apply(x, made[mode], None).float()
        assert float((y - wanted).norm() / wanted.norm()) < 2**-8
