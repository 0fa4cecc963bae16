"""What lies around DeepGEMM's product, by a stand-in for it and Triton's interpreter: without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantplug.activations import read_activation
from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerBlock, SegmentSpec, WeightSpec
from quantplug_deepgemm.kernel import DeepGemmKernel
from quantplug_deepgemm.probe import _try_product
from quantplug_testkit.canonical import make_weight
from quantplug_testkit.conformance.case import Case
from quantplug_testkit.conformance.problems import CATALOGUE
from quantplug_testkit.oracles.activation import Rule, quantize

product = pytest.importorskip(
    "quantplug_deepgemm.product", reason="triton is installed on Linux only", exc_type=ImportError
)
KERNEL, GPU, CPU = DeepGemmKernel(), Platform.parse("cuda:9.0"), torch.device("cpu")
ACCEPTED = {
    hazard.family: hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}
pytestmark = pytest.mark.usefixtures("stand_in")


def test_the_catalogue_has_whole_blocks_and_ragged_ones():
    assert set(ACCEPTED) == {"x-float8-groups-and-blocks", "x-float8-ragged-groups-and-blocks"}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_element_is_within_the_derived_bound(name):
    case = Case(KERNEL, GPU, CPU, ACCEPTED[name])
    for rows in (0, 1, 5):
        x = case.inputs(rows)
        before = x.clone()
        case.check(x, case.apply(x), f"{rows} rows")
        assert torch.equal(x, before)


def test_deepgemm_is_asked_for_sizes_as_constants_by_one_thread_at_a_time(stand_in, monkeypatch):
    """Without them registers spill; and the table of what it compiled is nobody's but the one thread's."""
    asked, multiply = [], stand_in.fp8_gemm_nt

    def watched(*given, **how):
        asked.append((how, product._compiling.locked()))
        multiply(*given, **how)

    monkeypatch.setattr(stand_in, "fp8_gemm_nt", watched)
    case = Case(KERNEL, GPU, CPU, next(iter(ACCEPTED.values())))
    case.apply(case.inputs(3))
    assert asked == [({"compiled_dims": "nk"}, True)]
    assert not product._compiling.locked()


@pytest.mark.parametrize("sizes", [(200, 72), (256, 72)])
def test_segments_and_a_bias_give_what_each_gives_alone(sizes):
    """Where the first ends within a block, each is a product of its own."""
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32")
    permission, dice = read_activation("float8_e4m3fn/group128/dynamic", "here"), np.random.default_rng(0)
    segments = [SegmentSpec(size, spec) for size in sizes]
    weights = [make_weight(spec, size, 300, dice) for size in sizes]

    def made(number):
        problem = LinearProblem(300, tuple(segments[number]), "bfloat16", True, permission)
        return KERNEL.prepare(problem, weights[number], [None] * len(weights[number]), CPU)

    x, bias = torch.randn(5, 300).bfloat16(), torch.randn(sum(sizes)).bfloat16()
    whole = made(slice(0, 2))
    assert whole.meta["parts"] == (2 if sizes[0] % 128 else 1)
    alone = [KERNEL.apply(x, made(slice(number, number + 1)), None) for number in (0, 1)]
    assert torch.equal(KERNEL.apply(x, whole, bias), torch.cat(alone, dim=1) + bias)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_way_back_gives_every_bit_again(name):
    case = Case(KERNEL, GPU, CPU, ACCEPTED[name])
    for found, given in zip(KERNEL.unprepare(case.prepared), ACCEPTED[name].weights(), strict=True):
        assert torch.equal(found.codes.view(torch.uint8), given.codes.view(torch.uint8))
        assert torch.equal(found.scales, given.scales)
    values = torch.cat([weight.dequantize() for weight in ACCEPTED[name].weights()])
    assert torch.equal(KERNEL.dequantize(case.prepared, torch.float32), values)


@pytest.mark.parametrize(("rows", "k"), [(1, 130), (6, 1100)])
def test_x_is_quantized_as_the_oracle_says(rows, k):
    """Codes, of which those beyond x are 0, and scales, of which a row of zeros has the smallest."""
    x = torch.randn(rows, 2 * k, generator=torch.Generator().manual_seed(0)).bfloat16()[:, ::2]
    x[-1] = 0
    width = -(-k // 512) * 512
    codes, scales = product.quantized(x, width)
    assert codes.shape == (rows, width)
    assert scales.stride() == (1, -(-rows // 4) * 4)
    values = (codes.double() * scales.double().repeat_interleave(128, 1)).numpy()
    right = quantize(x.double().numpy(), Rule("float8_e4m3fn", "group", True, 128))
    assert (abs(values[:, :k] - right.values) <= right.error).all()
    assert not values[:, k:].any()
    assert (scales[-1] == torch.finfo(torch.float32).tiny).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which multiplies infinity by 0
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(value):
    case = Case(KERNEL, GPU, CPU, ACCEPTED["x-float8-groups-and-blocks"])
    x = case.inputs(3)
    x[1, 7] = value
    finite = case.apply(x).isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any()


def test_the_operator_keeps_torchs_rules():
    case = Case(KERNEL, GPU, CPU, ACCEPTED["x-float8-ragged-groups-and-blocks"])
    tensors, rows = case.prepared.tensors, case.prepared.meta["rows.0"]
    bias = torch.randn(rows).bfloat16()
    arguments = (case.inputs(3), tensors["codes.0"], tensors["scales.0"], bias, rows)
    # Not test_schema, which compares operands by operators that torch does not have for 8-bit floats.
    torch.library.opcheck(product.linear, arguments, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


def test_the_compiler_sees_one_operator():
    case = Case(KERNEL, GPU, CPU, ACCEPTED["x-float8-groups-and-blocks"])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: KERNEL.apply(x, case.prepared, None), fullgraph=True, backend="aot_eager")
    for rows in (3, 1, 0):
        x = case.inputs(rows)
        assert torch.equal(compiled(x), KERNEL.apply(x, case.prepared, None))


def test_the_probe_tries_a_product(stand_in, monkeypatch):
    assert _try_product("cpu") is None

    def no_compiler(*args, **options):
        raise RuntimeError("Assertion error:\nstd::filesystem::exists(nvcc_path)")

    monkeypatch.setattr(stand_in, "fp8_gemm_nt", no_compiler)
    refusal = _try_product("cpu")
    assert refusal is not None
    assert "exists(nvcc_path)" in refusal.reason
    monkeypatch.setattr(stand_in, "fp8_gemm_nt", lambda a, b, d, **options: d.zero_())
    refusal = _try_product("cpu")
    assert refusal is not None
    assert refusal.reason == "a small product of DeepGEMM is wrong"
