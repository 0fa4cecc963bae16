"""
The kernels for experts without a GPU: their layout and back, and their products, element by element.

torch has no grouped product of 8-bit floats on the CPU, so that one is done in float64 here, and refuses what torch's
own refuses. Everything around it runs through Triton's interpreter and by plain operators. On a machine with a GPU
tests/device does all of it, and more.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from quantplug.expertweights import ExpertWeights
from quantplug.kernel import Accepted, Cast
from quantplug.moe import ExpertFunction
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerChannel, PerTensor, WeightSpec
from quantplug_cublas import mixture
from quantplug_cublas.experts import CublasExperts, FastCublasExperts
from quantplug_testkit.canonical import weight_tensors
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family
from quantplug_testkit.conformance.experts.routing import scatter

KERNEL, GPU, CPU = CublasExperts(), Platform.parse("cuda:9.0"), torch.device("cpu")
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
WHOLE = replace(ROWS, granularity=PerTensor())
TOKEN, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/tensor/static"
LIMITED = ExpertFunction("silu", limit=1.0, alpha=1.702, up_offset=1.0)
RELU2 = ExpertFunction("relu2", gated=False)


def in_bfloat16(*args, **options):
    """The family's layer in bfloat16, the only dtype that is taken."""
    return next(hazard for hazard in family(*args, **options) if hazard.problem.dtype == "bfloat16")


FAMILIES = {
    hazard.family: hazard for hazard in EXPERT_CATALOGUE if isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}
OWN = {
    hazard.family: hazard
    for hazard in (
        in_bfloat16("bias-odd", ROWS, experts=3, hidden=61, intermediate=33, bias=True, activation=TOKEN),
        in_bfloat16("static-bias", WHOLE, ROWS, hidden=40, intermediate=24, bias=True, activation=STATIC),
        in_bfloat16("static-no-gate", WHOLE, function=RELU2, activation=STATIC),
        in_bfloat16("on-input", ROWS, top_k=1, weight_on_input=True, bias=True, activation=TOKEN),
        in_bfloat16("differ", (ROWS, WHOLE), WHOLE, function=LIMITED, reach=4.0, activation=TOKEN),
        in_bfloat16("gelu", ROWS, function=ExpertFunction("gelu"), activation=TOKEN),
        in_bfloat16("gelu-tanh", ROWS, function=ExpertFunction("gelu_tanh", gated=False), reach=1.0, activation=TOKEN),
    )
}
ALL = FAMILIES | OWN
SOME = ("x-float8", "static-bias")


def multiply(
    x, weights, x_scales, scales, offs=None, bias=None, scale_result=None, out_dtype=None, use_fast_accum=True
):
    """The grouped product of torch, as far as `ScaledGroupMM.cu` of torch 2.9 to 2.13 takes it; the rest is poison."""
    assert (x.dtype, weights.dtype, offs.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.int32)
    assert (bias, scale_result, out_dtype, use_fast_accum) == (None, None, torch.bfloat16, False)
    groups, inputs, outputs = weights.shape
    assert inputs % 16 == outputs % 16 == 0
    assert weights.stride()[1:] == (1, inputs)
    assert x.is_contiguous()
    assert x_scales.shape == x.shape[:1]
    assert scales.shape == (groups, outputs)
    assert offs.shape == (groups,)
    y = torch.full((len(x), outputs), torch.nan, dtype=torch.bfloat16)
    start = 0
    for group, end in enumerate(offs.tolist()):
        assert start <= end <= len(x)
        sums = x[start:end].double() @ weights[group].double()
        y[start:end] = (sums * x_scales[start:end, None].double() * scales[group].double()).to(torch.bfloat16)
        start = end
    return y


@pytest.fixture(autouse=True)
def products(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_grouped_mm", multiply)


@pytest.fixture(params=["interpreter", "plain"])
def ways(request, monkeypatch):
    """Both ways to do what lies around the products."""
    if request.param == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here: see tests/device")
    monkeypatch.setattr(mixture, "_LAUNCHES", mixture._LAUNCHES and request.param == "interpreter")


def prepared(name: str) -> ExpertCase:
    return ExpertCase(KERNEL, GPU, CPU, ALL[name])


def test_the_catalogue_has_each_permission():
    assert set(FAMILIES) == {"x-float8", "x-float8-static", "x-float8-tiles"}


@pytest.mark.parametrize("name", ALL)
def test_every_element_is_within_the_derived_bound(name, ways):
    case = prepared(name)
    for rows, kind in ((1, "spread"), (9, "mixed")):
        x, routing = case.inputs(rows), case.route(rows, kind)
        before = x.clone()
        case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", SOME)
def test_every_routing_is_within_the_derived_bound(name, ways):
    case = prepared(name)
    for rows, kind in ((20, "one-expert"), (9, "idle-ends"), (9, "repeated"), (5, "nowhere"), (0, "spread")):
        x, routing = case.inputs(rows), case.route(rows, kind)
        case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")
    x = case.inputs(9)
    for dtype in (torch.int64, torch.int32):
        routing = scatter(case.hazard, case.route(9)).with_ids(dtype)
        case.check(x, routing, case.apply(x, routing), f"ids and a map in {dtype}")


def test_padding_hides_what_x_and_weights_hold(ways):
    case = prepared("bias-odd")
    x, routing = case.inputs(6), case.route(6, "spread")
    clean = x.clone()
    clean[::2] = 0
    for holder, value in ((x, torch.nan), (routing.weights, torch.inf), (routing.ids, -1)):
        holder[::2] = value
    y = case.apply(x, routing)
    assert torch.equal(y[::2], torch.zeros_like(y[::2]))
    case.check(clean, routing, y, "y beside padded rows")


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("count", [1, 17, 512, 513, 2000])
def test_choices_of_an_expert_lie_together_in_their_order(turns, count, ways):
    """Also where several programs put them in order, whose counts are added up in several goes."""
    chosen = mixture.expertlaunch if mixture._LAUNCHES else mixture.expertplain
    ids = torch.randint(-1, 43, (count,), generator=torch.Generator().manual_seed(count))[:, None]
    routed = chosen.route(ids, None, 40, turns)
    local = torch.where((ids >= 0) & (ids < 40), ids, 40)[:, 0]
    order = torch.argsort(local, stable=True)
    assert torch.equal(routed.local, local.int())
    assert torch.equal(routed.places[order], torch.arange(count).int())
    ends = torch.bincount(local, minlength=41)[:40].cumsum(0)
    assert torch.equal(routed.ends, torch.cat([turn * ends[-1] + ends for turn in range(turns)]).int())


@pytest.mark.parametrize("name", ["bias-odd", "static-no-gate"])
def test_rows_longer_than_a_program_are_taken_piece_by_piece(name, monkeypatch):
    launch = pytest.importorskip("quantplug_cublas.expertlaunch", exc_type=ImportError)
    monkeypatch.setattr(launch, "WIDEST", 16)
    case = prepared(name)
    x, routing = case.inputs(5), case.route(5)
    case.check(x, routing, case.apply(x, routing), "5 rows")


def test_very_many_choices_are_multiplied_in_several_goes(monkeypatch):
    case = prepared("x-float8")
    x, routing = case.inputs(9), case.route(9)
    whole = case.apply(x, routing)
    monkeypatch.setattr(mixture, "_MOST_CHOICES", 8)
    assert_bitwise_equal(case.apply(x, routing), whole, "y in three goes")


def test_groups_without_rows_stand_between_where_torchs_tile_would_be_slow(monkeypatch):
    case = prepared("x-float8")
    x, routing = case.inputs(40), case.route(40)
    whole = case.apply(x, routing)
    seen = []
    monkeypatch.setattr(
        torch,
        "_scaled_grouped_mm",
        lambda *args, **options: seen.append(args[1].shape[0]) or multiply(*args, **options),
    )
    monkeypatch.setattr(mixture, "_FEW", 15)
    assert_bitwise_equal(case.apply(x, routing), whole, "y by more groups")
    assert seen == [7, 7]


def test_sums_are_added_up_fast_where_that_is_asked_for(monkeypatch):
    """Which torch's tiles for many rows bear."""
    asked = []

    def fast_product(*args, use_fast_accum, **options):
        asked.append((use_fast_accum, args[1].shape[0]))
        return multiply(*args, use_fast_accum=False, **options)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", fast_product)
    monkeypatch.setattr(mixture, "_FEW", 15)
    case = ExpertCase(FastCublasExperts(), GPU, CPU, ALL["x-float8"])
    assert case.kernel.traits.by_request
    assert case.casts == (Cast("long_accumulator", "float22_e8m13"), Cast("partials", "bfloat16"))
    x, routing = case.inputs(40), case.route(40)
    case.check(x, routing, case.apply(x, routing), "40 rows")
    assert asked == [(True, 4), (True, 4)]


def test_strided_operands_are_read_where_they_lie(ways):
    case = prepared("on-input")
    x, routing = case.inputs(6), case.route(6)
    wide = torch.full((6, 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    expected = case.apply(x, routing)
    assert_bitwise_equal(case.apply(wide[:, ::2], routing), expected, "y of every second column")
    assert_bitwise_equal(case.apply(x.t().contiguous().t(), routing), expected, "y of a transposed view")


@pytest.mark.parametrize("name", ALL)
def test_the_way_back_gives_every_bit_again(name):
    case = prepared(name)
    for number in (0, case.hazard.problem.experts - 1):
        found, given = KERNEL.unprepare(case.prepared, number), case.hazard.expert(number)
        for ours, theirs in zip((*found.w13, found.w2), (*given.w13, given.w2), strict=True):
            assert ours.spec == theirs.spec
            for kind, tensor in weight_tensors(theirs).items():
                assert_bitwise_equal(weight_tensors(ours)[kind], tensor, kind)
        values = KERNEL.dequantize(case.prepared, number)
        assert torch.equal(values[0], torch.cat([weight.dequantize() for weight in given.w13]))
        assert torch.equal(values[1], given.w2.dequantize())


@pytest.mark.parametrize("name", ALL)
def test_what_is_held_is_what_is_declared(name):
    case = prepared(name)
    every = [case.hazard.expert(number) for number in range(case.hazard.problem.experts)]
    weights = sum(t.nbytes for e in every for w in (*e.w13, e.w2) for t in (w.codes, w.scales))
    biases = sum(t.nbytes for e in every if e.b2 is not None for t in (*e.b13, e.b2))
    assert case.prepared.nbytes == weights + biases + case.extra_bytes


def test_preparing_again_keeps_addresses():
    case = prepared("static-bias")
    kept = case.prepared
    places = {name: tensor.data_ptr() for name, tensor in kept.tensors.items()}
    again = case.prepare(seed=1, out=kept)
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == places
    for name, tensor in case.prepare(seed=1).tensors.items():
        assert torch.equal(again.tensors[name].float(), tensor.float()), name


def test_scales_in_float64_are_rounded_and_have_no_way_back():
    hazard = ALL["x-float8"]
    exact = [hazard.expert(number) for number in range(hazard.problem.experts)]
    exact = [replace(e, w2=replace(e.w2, scales=e.w2.scales.double() / 3)) for e in exact]
    made = KERNEL.prepare(hazard.problem, exact, CPU)
    assert torch.equal(KERNEL.dequantize(made, 0)[1], exact[0].w2.dequantize())
    with pytest.raises(NotImplementedError, match="holds float64 scales in float32"):
        KERNEL.unprepare(made, 0)


def test_a_stored_scale_that_is_missing_is_named():
    hazard = ALL["x-float8-static"]
    given: list[ExpertWeights] = [hazard.expert(number) for number in range(hazard.problem.experts)]
    given[2] = replace(given[2], a2=None)
    with pytest.raises(ValueError, match="a stored scale of x is missing: w2 of expert 2"):
        KERNEL.prepare(hazard.problem, given, CPU)


def test_the_operator_keeps_torchs_rules():
    case = prepared("x-float8")
    x, routing, tensors = case.inputs(3), case.route(3), case.prepared.tensors
    weights = [tensors.get(f"{p}.{kind}") for p in ("w13", "w2") for kind in ("codes", "scales", "x_scales", "bias")]
    arguments = (x, routing.weights, routing.ids, None, *weights, 32, False, "silu", True, None, 1.0, 0.0, False)
    # Not test_schema, which compares operands by operators that torch does not have for 8-bit floats.
    torch.library.opcheck(mixture.experts, arguments, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


def test_the_compiler_sees_one_operator():
    case = prepared("x-float8")
    torch.compiler.reset()
    made = case.prepared

    def call(x, weights, ids):
        return KERNEL.apply(x, weights, ids, made)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (3, 1, 0):
        x, routing = case.inputs(rows), case.route(rows)
        assert torch.equal(compiled(x, routing.weights, routing.ids), case.apply(x, routing))
