"""The kernel for experts in FP8, without a GPU: what it answers, what it shares, how it is cut, what compiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantplug.activations import read_activation
from quantplug.expertweights import PreparedExperts
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerBlock, PerChannel, WeightSpec
from quantplug_cublas.experts import CublasExperts
from quantplug_marlin import float8mixture
from quantplug_marlin.compiler import compiler
from quantplug_marlin.device import Target, options_for
from quantplug_marlin.float8cut import ROWS, Float8Cut, choose, cut_of, every_cut, likely_blocks
from quantplug_marlin.float8experts import MarlinFloat8Experts
from quantplug_marlin.float8mixture import _between_definitions, _row_definitions
from quantplug_marlin.source import source_of
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.case import ExpertCase, ExpertSubject

KERNEL, CUBLAS, GPU, CPU = MarlinFloat8Experts(), CublasExperts(), Platform.parse("cuda:9.0"), torch.device("cpu")
WEIGHT = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
TOKEN, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/tensor/static"
PROBLEM = MoEProblem(
    8, 2, 128, 64, (WEIGHT, WEIGHT), WEIGHT, ExpertFunction(), "bfloat16", activation=read_activation(TOKEN, "here")
)
H100 = Target((9, 0), 132, 227 << 10)
FIXED_BYTES = 8 * 2048 + 16 * 8
"""What `cuda/float8.cu` has besides what a launch asks for: buffers, and barriers of eight stages."""


class TestAnswersAboutFloat8Experts(ExpertSubject, ContractTests):
    kernel = KERNEL
    platform = GPU
    test_probe_passes_on_this_machine = None  # which is any machine here


def test_what_is_taken_quantizes_x_and_declares_its_roundings():
    for dtype in ("bfloat16", "float16"):
        verdict = KERNEL.supports(replace(PROBLEM, dtype=dtype), GPU)
        assert isinstance(verdict, Accepted)
        assert verdict.quantizes_x
        assert verdict.casts == (Cast("accumulator", "float22_e8m13"), Cast("gate_up", dtype), Cast("expert", dtype))
        assert verdict.extra_bytes == 0
        assert verdict.cost.at(1) < verdict.cost.at(4096)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"dtype": "float32"}, "dtype", "float32"),
        ({"experts": 3000}, "shape", "3000 experts"),
        ({"hidden": 20000}, "shape", "hidden is 20000"),
        ({"intermediate": 0}, "shape", "intermediate is 0"),
        ({"activation": read_activation(STATIC, "here")}, "activation", "tensor, static"),
        ({"activation": None}, "activation", "the file permits none"),
        ({"w2": replace(WEIGHT, granularity=PerBlock(128, 128))}, "granularity", "blocks of 128 x 128"),
        ({"w13": (WEIGHT,)}, "segments", "1 projections"),
    ],
)
def test_what_is_not_taken_is_named(changes, code, words):
    verdict = KERNEL.supports(replace(PROBLEM, **changes), GPU)
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in f"{verdict.reason} {verdict.fix}"


@pytest.mark.parametrize("platform", ["cpu", "cuda:8.9", "cuda:10.0", "cuda:gfx942"])
def test_other_platforms_are_refused(platform):
    assert isinstance(KERNEL.supports(PROBLEM, Platform.parse(platform)), Rejected)


def test_it_claims_to_beat_others_where_rows_are_many_and_experts_large():
    mixtral = replace(PROBLEM, hidden=4096, intermediate=14336)
    ours, theirs = KERNEL.supports(mixtral, GPU), CUBLAS.supports(mixtral, GPU)
    assert isinstance(ours, Accepted)
    assert isinstance(theirs, Accepted)
    assert ours.cost.at(4096) < theirs.cost.at(4096)


SHARED = {
    h.family: h
    for h in EXPERT_CATALOGUE
    if h.problem.dtype == "bfloat16"
    and all(isinstance(kernel.supports(h.problem, GPU), Accepted) for kernel in (KERNEL, CUBLAS))
}


@pytest.mark.parametrize("name", SHARED)
def test_one_copy_serves_cublas_too_and_leads_back(name):
    assert KERNEL.layout_id == CUBLAS.layout_id
    case, other = (ExpertCase(kernel, GPU, CPU, SHARED[name]) for kernel in (KERNEL, CUBLAS))
    mine, theirs = case.prepared.named_tensors(), other.prepared.named_tensors()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        octets = (held.contiguous().view(torch.uint8) for held in (tensor, theirs[key]))
        assert_bitwise_equal(*octets, key)
    for turn, weight in enumerate(KERNEL.unprepare(case.prepared, 0).w13):
        values = KERNEL.dequantize(case.prepared, 0)[0].chunk(len(case.prepared.problem.w13))[turn]
        assert_bitwise_equal(values, weight.dequantize(torch.float32), f"part {turn}")


def test_cuts_fit_into_the_memory_of_a_multiprocessor():
    for cut in every_cut(H100):
        assert cut.shared_bytes + FIXED_BYTES <= H100.shared_bytes, cut
        assert cut.depth >= 3
        assert cut.wide % 16 == 0
        # Two parts have half of the outputs each, which wgmma takes in multiples of eight, eight rows to a kilobyte.
        assert cut.wide // cut.parts % 8 == 0
    assert cut_of(128, Target((9, 0), 132, 99 << 10)).depth == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "between"), [(128, 8, 2048, 768), (8, 2, 4096, 1024), (4, 2, 64, 32)]
)
def test_every_number_of_rows_gets_kernels_that_were_built_ahead(experts, top_k, hidden, between, dtype, monkeypatch):
    """A call that compiled could not be captured in a graph."""
    built = {}
    monkeypatch.setattr(float8mixture, "target_of", lambda _: H100)
    monkeypatch.setattr(float8mixture, "build_all", lambda wanted, _: built.update(wanted))
    problem = replace(PROBLEM, experts=experts, top_k=top_k, hidden=hidden, intermediate=between, dtype=dtype)
    shapes = {"w13.codes": (experts, 2 * between, hidden), "w2.codes": (experts, hidden, between)}
    tensors = {name: torch.empty(shape, dtype=torch.uint8, device="meta") for name, shape in shapes.items()}
    float8mixture.build(PreparedExperts(KERNEL.layout_id, problem, tensors))
    half = dtype == "float16"
    for rows in (1, 7, 64, 300, 4096, 65536):
        for product, (_, outputs, inputs) in enumerate(shapes.values(), 1):
            cut = choose(outputs, inputs, rows * top_k, experts, H100)
            assert (cut.file, tuple(cut.definitions(product, half=half).items())) in built
    entering = _row_definitions(hidden) | {"HALF": int(half)}
    between_products = _between_definitions(between, 0, gated=True, limited=False, half=half)
    assert ("quantize.cu", tuple(entering.items())) in built
    assert ("between.cu", tuple(between_products.items())) in built
    assert ("route.cu", ()) in built
    assert ("combine.cu", (("HALF", int(half)),)) in built


def test_weights_that_are_read_for_few_rows_get_narrow_pieces():
    assert all(choose(28672, 4096, rows * 2, 8, H100).wide <= 128 for rows in (1, 16, 64, 256))
    assert all(choose(1536, 2048, rows * 8, 128, H100).wide <= 128 for rows in (2, 16, 128, 512))
    assert choose(28672, 4096, 8192, 8, H100).wide > 128


def test_blocks_are_as_many_as_experts_that_are_chosen_or_what_their_rows_fill():
    assert likely_blocks(2, 8) == 2
    assert likely_blocks(200, 8) == 8
    assert 4096 / ROWS < likely_blocks(4096, 8) <= 4096 / ROWS + 8


@pytest.mark.parametrize("product", [1, 2])
@pytest.mark.parametrize("cut", every_cut(H100), ids=str)
def test_the_products_compile(cut: Float8Cut, product: int):
    source = source_of(cut.file, cut.definitions(product, half=product == 1))
    assert compiler().compile(source, options_for("sm_90a"))[:4] == b"\x7fELF"


@pytest.mark.parametrize("width", [16, 768, 4096, 14336])
def test_what_quantizes_rows_takes_all_of_a_row_and_compiles(width):
    how = _row_definitions(width)
    assert how["THREADS"] * how["TURNS"] * 8 >= width
    assert how["THREADS"] <= 1024
    between = _between_definitions(width, 0, gated=True, limited=True, half=False)
    for file, definitions in (("quantize.cu", how | {"HALF": 1}), ("between.cu", between)):
        assert compiler().compile(source_of(file, definitions), options_for("sm_90a"))[:4] == b"\x7fELF"
