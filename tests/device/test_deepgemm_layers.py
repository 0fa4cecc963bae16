"""The DeepGEMM kernel on a GPU beyond the conformance class: what sums lose, large layers, graphs, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from quantplug.activations import read_activation
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerBlock, SegmentSpec, WeightSpec
from quantplug.weight import Prepared, Weight
from quantplug_deepgemm.kernel import DeepGemmKernel

pytest.importorskip("deep_gemm", reason="sgl-deep-gemm is not installed here", exc_type=ImportError)
product = pytest.importorskip("quantplug_deepgemm.product", reason="triton is not installed here", exc_type=ImportError)
KERNEL, FLOAT8 = DeepGemmKernel(), torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def hopper(cuda: torch.device) -> torch.device:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return cuda


def layer(codes: torch.Tensor) -> Prepared:
    """Return a prepared layer whose scales are all 1."""
    (n, k), spec = codes.shape, WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32")
    permission = read_activation("float8_e4m3fn/group128/dynamic", "here")
    problem = LinearProblem(k, (SegmentSpec(n, spec),), "bfloat16", activation=permission)
    scales = torch.ones(-(-n // 128), -(-k // 128))
    return KERNEL.prepare(problem, [Weight(codes.cpu(), scales, spec)], [None], torch.device("cuda"))


def random_layer(n: int, k: int) -> Prepared:
    generator = torch.Generator("cuda").manual_seed(0)
    octets = torch.randint(0, 256, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
    return layer((octets & 0xBF).view(FLOAT8))


def random_x(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)


def check(made: Prepared, x: torch.Tensor, y: torch.Tensor) -> None:
    """Hold y against the float64 product of the same codes, which y's own rounding alone is allowed to part from."""
    codes, scales = product.quantized(x, x.shape[1])
    right = codes.double() * scales.double().repeat_interleave(128, 1) @ made.tensors["codes.0"].double().t()
    assert float((y.double() - right).norm() / right.norm()) < 2**-8


@pytest.mark.parametrize(("rows", "n"), [(1, 256), (16, 4096), (512, 4096)])
def test_sums_lose_what_is_far_below_a_product_of_the_same_128_inputs_only(rows: int, n: int) -> None:
    """What the bound of the cast "accumulator" stands on: 13 bits behind the leading one, and then float32."""
    k, large = 1024, {300: 256.0, 1000: -256.0}
    codes = torch.full((n, k), 2.0**-8, device="cuda")
    # The largest code of each group of x, by which the scale is 1, is multiplied by 0. Large products cancel out.
    codes[:, ::128], codes[:, list(large)] = 0, 1
    made = layer(codes.to(FLOAT8))
    for bits in (13, 14):
        lost = []
        for block in range(0, k, 128):
            x = torch.zeros(rows, k, device="cuda", dtype=torch.bfloat16)
            x[:, ::128] = 448
            for place, value in large.items():
                x[:, place] = value
            x[:, block + 77] = 2.0 ** (16 - bits)
            y = KERNEL.apply(x, made, None)
            lost.append(bool((y == 0).all()))
            assert lost[-1] or bool((y == 2.0 ** (8 - bits)).all())
        with_large = {place // 128 * 128 for place in large}
        assert lost == [bits > 13 and block in with_large for block in range(0, k, 128)]


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 4096, 14336), (64, 4096, 14336), (300, 4096, 14336), (384, 8192, 8192), (512, 8192, 8192), (2048, 4096, 4096)],
)
def test_layers_of_real_sizes_are_near_the_float64_product(rows: int, n: int, k: int) -> None:
    made, x = random_layer(n, k), random_x(rows, k)
    check(made, x, KERNEL.apply(x, made, None))


def test_a_graph_may_be_captured_of_what_was_never_compiled() -> None:
    """DeepGEMM's part of it; what Triton compiled is there from other calls."""
    KERNEL.apply(random_x(1, 1536), random_layer(128, 1536), None)
    made, x = random_layer(1280, 1536), random_x(48, 1536)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = KERNEL.apply(x, made, None)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        check(made, x, y)


def test_threads_may_compile_at_once() -> None:
    made = random_layer(640, 1024)
    given, together = [random_x(rows, 1024) for rows in (16, 32, 64, 300)], Barrier(4, timeout=60)

    def run(x: torch.Tensor) -> torch.Tensor:
        together.wait()
        return KERNEL.apply(x, made, None)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, given))
    for x, y in zip(given, results, strict=True):
        check(made, x, y)


def test_the_probe_passes() -> None:
    assert KERNEL.probe(Platform.parse("cuda:9.0")) is None
