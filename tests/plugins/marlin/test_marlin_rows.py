"""The kernel in the layout of products in FP8, without a GPU: what it answers, what it shares, how it is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Rejected
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug_cublas.kernel import CublasKernel
from quantplug_marlin.compiler import compiler
from quantplug_marlin.cut import Cut, GroupCut
from quantplug_marlin.device import Target, options_for
from quantplug_marlin.form import Form
from quantplug_marlin.kernel import MarlinKernel
from quantplug_marlin.rowcalls import form_of_rows, sizes_of
from quantplug_marlin.rowchoice import choose_rows, every_rows_choice
from quantplug_marlin.rowkernel import MarlinRowsKernel
from quantplug_marlin.source import source_of
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.conformance.problems import CATALOGUE

KERNEL, CUBLAS, GPU, CPU = MarlinRowsKernel(), CublasKernel(), Platform.parse("cuda:9.0"), torch.device("cpu")
WEIGHT = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
BLOCKS = replace(WEIGHT, granularity=PerBlock(128, 128))
TOKEN, GROUP = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic"
TARGETS = {
    "A100": Target((8, 0), 108, 163 << 10),
    "L4": Target((8, 9), 58, 99 << 10),
    "H100": Target((9, 0), 132, 227 << 10),
}
PLAIN = Form(ElementType.FLOAT8_E4M3FN, half=False, scale="", parts=0, per_group=1, rows=True)
SCALED = PLAIN._replace(scale="float32", parts=1, per_group=2)
FEW, MANY = Cut(1, 8, 2, 8, 3), GroupCut(2, 64, 2, 1, 4)


def asked(weight=WEIGHT, activation=TOKEN, n=4096, k=4096, dtype="bfloat16"):
    return LinearProblem(k, (SegmentSpec(n, weight),), dtype, activation=read_activation(activation, "here"))


def cublas_runs(problem: LinearProblem) -> bool:
    return isinstance(CUBLAS.supports(problem, GPU), Accepted)


SHARED = {
    h.family: h for h in CATALOGUE if h.problem.dtype == "bfloat16" and h.problem.uniform and cublas_runs(h.problem)
}


def test_what_products_in_fp8_take_is_accepted_and_nothing_else():
    for hazard in CATALOGUE:
        ours = isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
        assert ours == (cublas_runs(hazard.problem) and hazard.problem.dtype != "float32"), hazard.name


def test_x_stays_as_it_is_and_nothing_is_cast():
    for problem in (asked(), asked(BLOCKS, GROUP), asked(replace(WEIGHT, granularity=PerTensor()))):
        verdict = KERNEL.supports(problem, GPU)
        assert isinstance(verdict, Accepted)
        assert not verdict.quantizes_x
        assert verdict.casts == ()


@pytest.mark.parametrize("weight", [WEIGHT, BLOCKS], ids=["row", "block"])
@pytest.mark.parametrize("size", [(4096, 4096), (28672, 4096)], ids=str)
def test_one_copy_serves_few_rows_here_and_many_there(weight, size):
    problem = asked(weight, TOKEN if weight is WEIGHT else GROUP, *size)
    here, there = KERNEL.supports(problem, GPU), CUBLAS.supports(problem, GPU)
    assert isinstance(here, Accepted)
    assert isinstance(there, Accepted)
    assert KERNEL.layout_id == CUBLAS.layout_id
    assert here.extra_bytes == there.extra_bytes
    assert all(here.cost.at(rows) < there.cost.at(rows) for rows in (1, 16))
    assert all(here.cost.at(rows) > there.cost.at(rows) for rows in (512, 8192))
    tiles = MarlinKernel().supports(problem, GPU)
    assert isinstance(tiles, Accepted)
    assert abs(here.cost.at(1) - tiles.cost.at(1)) < 0.1 * tiles.cost.at(1)


@pytest.mark.parametrize("hazard", SHARED.values(), ids=lambda hazard: hazard.family)
def test_either_kernel_makes_the_same_bits(hazard):
    made = [kernel.prepare(hazard.problem, hazard.weights(), hazard.activation(), CPU) for kernel in (KERNEL, CUBLAS)]
    ours, theirs = made
    assert (ours.layout_id, ours.meta, ours.problem) == (theirs.layout_id, theirs.meta, theirs.problem)
    assert list(ours.tensors) == list(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].stride() == tensor.stride()
        assert_bitwise_equal(ours.tensors[name], tensor, name)
    assert ours.nbytes <= hazard.problem.stored_bytes + KERNEL.supports(hazard.problem, GPU).extra_bytes


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (asked(), "cpu", "platform", "not on cpu"),
        (asked(), "cuda:7.5", "arch", "7.5"),
        (asked(), "cuda:gfx942", "arch", "gfx942"),
        (asked(dtype="float32"), "cuda", "dtype", "float32"),
        (asked(activation="none"), "cuda", "activation", "permits none"),
        (asked(replace(WEIGHT, element=ElementType.INT8)), "cuda", "element", "codes are int8"),
        (asked(replace(BLOCKS, granularity=PerBlock(64, 64)), GROUP), "cuda", "granularity", "blocks of 64 x 64"),
        (asked(n=0), "cuda", "shape", "out_features is 0"),
    ],
)
def test_a_refusal_names_what_failed(problem, platform, code, words):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason


def test_verdicts_keep_the_contract_on_every_question():
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = KERNEL, GPU
    tests.test_refusing_names_the_offending_value()
    tests.test_accepting_is_well_formed()
    tests.test_supports_imports_nothing_foreign()


def test_what_is_filled_up_and_where_it_was_not_run_is_noted():
    assert KERNEL.supports(asked(k=61), GPU).notes == ("K is filled up to 64",)
    notes = KERNEL.supports(asked(), Platform.parse("cuda:8.9")).notes
    assert notes == ("compute capability 8.9: not run on hardware",)


def test_tensors_tell_the_form():
    for weight, activation, form in ((WEIGHT, TOKEN, PLAIN), (BLOCKS, GROUP, SCALED)):
        hazard = next(h for h in SHARED.values() if h.problem.segments[0].weight.granularity == weight.granularity)
        held = KERNEL.prepare(hazard.problem, hazard.weights(), hazard.activation(), CPU).tensors
        assert form_of_rows(held["codes.0"], held["scales.0"], half=False) == form, activation
    assert sizes_of(torch.empty(48, 208)) == (3, 2)


@pytest.mark.parametrize("form", [PLAIN, SCALED], ids=["one scale per row", "blocks"])
@pytest.mark.parametrize(("cut", "architecture"), [(FEW, "sm_80"), (MANY, "sm_90a")], ids=["few rows", "warpgroups"])
def test_the_product_compiles(form, cut, architecture):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is installed on Linux only")
    definitions = {**form.definitions(), **cut.definitions()}
    code = compiler().compile(source_of(cut.file, definitions), options_for(architecture))
    assert code[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize(
    ("element", "half"),
    [(ElementType.FLOAT8_E4M3FN, False), (ElementType.FLOAT8_E5M2, True)],
    ids=["e4m3fn and bfloat16", "e5m2 and float16"],
)
def test_every_choice_compiles(element, half, machine):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is installed on Linux only")
    for form in (PLAIN, SCALED):
        form = form._replace(element=element, half=half)
        for cut in every_rows_choice(form, 256, 32, TARGETS[machine]):
            definitions = {**form.definitions(), **cut.definitions()}
            options = options_for(TARGETS[machine].architecture)
            assert compiler().compile(source_of(cut.file, definitions), options)


@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize("form", [PLAIN, SCALED], ids=["one scale per row", "blocks"])
def test_every_choice_fits_covers_the_product_and_is_built_ahead(form, machine):
    """A call that compiled could not be captured in a graph."""
    target = TARGETS[machine]
    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (1024, 4096), (576, 576), (16, 16), (151936, 2048)):
        tiles, chunks = -(-n // 16), -(-k // 128)
        built = [(cut.file, cut.definitions()) for cut in every_rows_choice(form, tiles, chunks, target)]
        for rows in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 100, 200, 512, 1000, 8192, 9000, 65536):
            cut = choose_rows(form, tiles, chunks, rows, target)
            about = f"{machine} {form} {n}x{k} {rows} rows: {cut}"
            assert (cut.file, cut.definitions()) in built, about
            assert cut.threads <= 1024, about
            if isinstance(cut, GroupCut):
                assert cut.shared_bytes(form) + cut.fixed_bytes <= target.shared_bytes, about
                assert cut.chunks == 2, about
                assert 2 * chunks % (2 * cut.stages) == 0, about
                continue
            across, down, splits = cut.grid(tiles, rows)
            assert cut.shared_bytes(form) <= target.shared_bytes, about
            assert across // cut.shares * cut.tiles * cut.warps_n >= tiles, about
            assert down * cut.tokens >= rows, about
            assert splits == 1, about
            assert cut.warps_n == 1 or cut.warps_k <= 15, about  # of sixteen barriers, one is the whole block's
            assert cut.warps_k * cut.shares <= chunks, about
