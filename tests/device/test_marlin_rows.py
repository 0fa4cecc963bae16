"""The kernel in the layout of products in FP8, on a GPU: conformance, both kernels of one layer, every cut."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from device_checks import (
    check_chain,
    check_graph,
    check_product,
    check_that_calls_compile_nothing,
    check_two_streams,
)

from quantplug import dispatch
from quantplug.activations import read_activation
from quantplug.platform import Platform
from quantplug.rowprepare import prepare
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug.weight import Prepared, Weight
from quantplug_testkit.canonical import make_weight
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance import LinearKernelConformance

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_marlin import rowcalls
from quantplug_marlin.cut import Cut, GroupCut
from quantplug_marlin.device import target_of
from quantplug_marlin.rowkernel import MarlinRowsKernel

KERNEL = MarlinRowsKernel()
CAPABILITY = "{}.{}".format(*torch.cuda.get_device_capability())
MODES = {
    "tensor": (PerTensor(), "float8_e4m3fn/tensor/dynamic"),
    "row": (PerChannel(), "float8_e4m3fn/token/dynamic"),
    "block": (PerBlock(128, 128), "float8_e4m3fn/group128/dynamic"),
}
N, K = 1048, 1116
"""Outputs and inputs that end within a tile, and a chunk."""


class TestMarlinRows(LinearKernelConformance):
    kernel = KERNEL
    platform = Platform.parse(f"cuda:{CAPABILITY}")
    device = "cuda"


def layer(mode: str, dtype: str = "bfloat16", n: int = N, k: int = K) -> tuple[Prepared, Weight]:
    granularity, permission = MODES[mode]
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, granularity, "float32")
    weight = make_weight(spec, n, k, np.random.default_rng(0))
    problem = LinearProblem(k, (SegmentSpec(n, spec),), dtype, activation=read_activation(permission, "here"))
    return KERNEL.prepare(problem, [weight], [None], torch.device("cuda")), weight


def inputs(rows: int, dtype: str = "bfloat16", k: int = K) -> torch.Tensor:
    return torch.randn(rows, k, device="cuda").to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_rows_of_any_stride_is_within_the_bound(mode: str, dtype: str) -> None:
    prepared, weight = layer(mode, dtype)
    for rows in (0, 1, 3, 8, 9, 17, 32, 33, 64, 65, 129, 300):
        x = inputs(rows, dtype)
        y = KERNEL.apply(x, prepared, None)
        check_product(x, y, weight, f"{rows} rows")
        wide = torch.full((rows, 2 * K + 8), torch.nan, dtype=x.dtype, device="cuda")
        wide[:, 3 : 3 + 2 * K : 2] = x
        assert_bitwise_equal(
            KERNEL.apply(wide[:, 3 : 3 + 2 * K : 2], prepared, None), y, f"{rows} rows of another stride"
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 16, 33, 130])
def test_a_graph_gives_what_plain_calls_give_also_for_other_inputs(mode: str, rows: int) -> None:
    check_graph(KERNEL, *layer(mode), lambda: inputs(rows), f"{mode}, {rows} rows")


@pytest.mark.parametrize("mode", MODES)
def test_two_streams_at_once_do_not_disturb_each_other(mode: str) -> None:
    prepared, _ = layer(mode)
    for rows in (1, 40):
        check_two_streams(KERNEL, prepared, partial(inputs, rows))


def test_a_chain_of_layers_reads_what_the_one_before_has_written() -> None:
    layers = [layer("row", n=1024, k=1024)[0] for _ in range(5)]
    check_chain(KERNEL, layers, lambda rows: inputs(rows, k=1024))


@pytest.mark.parametrize("mode", MODES)
def test_the_operator_keeps_torchs_rules(mode: str) -> None:
    tensors = layer(mode)[0].tensors
    given = (inputs(3), tensors["codes.0"], tensors["scales.0"], None, N)
    # Not test_schema, which compares operands by operators that torch does not have for 8-bit floats.
    torch.library.opcheck(rowcalls.linear_rows, given, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


CUTS = (
    Cut(1, 8, 2, 8, 3),
    Cut(2, 8, 1, 9, 2),
    Cut(1, 16, 4, 2, 4),
    Cut(2, 16, 2, 4, 3, shares=2),
    Cut(2, 32, 4, 1, 3, shares=4),
    Cut(1, 64, 2, 2, 2),
    GroupCut(1, 32, 2, 1, 4, shares=2),
    GroupCut(2, 64, 2, 1, 4),
    GroupCut(2, 128, 2, 1, 3, most=3),
)
"""Those, too, that no device would choose."""


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("mode", ["row", "block"])
def test_every_way_to_cut_a_product_gives_it(mode: str, cut: Cut | GroupCut) -> None:
    if (isinstance(cut, GroupCut) and not target_of(0).warpgroups) or (cut.shares > 1 and not target_of(0).clusters):
        pytest.skip("needs compute capability 9.0")
    check_cut(mode, cut, K)


def check_cut(mode: str, cut: Cut | GroupCut, width: int) -> None:
    """Hold a product of some inputs, cut in one way, against the oracle."""
    prepared, weight = layer(mode, k=width)
    codes, scales = prepared.tensors["codes.0"], prepared.tensors["scales.0"]
    form, stream = rowcalls.form_of_rows(codes, scales, half=False), torch.cuda.current_stream().cuda_stream
    for rows in (1, 7, 65, 130):
        way = rowcalls.way(form, cut, *rowcalls.sizes_of(codes), rows, 0, stream)
        x = torch.nn.functional.pad(inputs(rows, k=width), (0, -width % 8))
        y = torch.full((rows, N), torch.nan, dtype=torch.bfloat16, device="cuda")
        rowcalls.run(way, x, codes, scales, None, y)
        check_product(x[:, :width], y, weight, f"{cut}, {rows} rows")


def test_nothing_is_compiled_by_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_calls_compile_nothing(KERNEL, layer("row")[0], inputs, rowcalls, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_one_copy_serves_few_rows_here_and_many_there(mode: str) -> None:
    """A layer whose kernels share the layout, as a plan has it, against the oracle and against the other kernel."""
    cublas = pytest.importorskip(
        "quantplug_cublas.kernel", reason="quantplug-cublas is not installed here"
    ).CublasKernel()
    if CAPABILITY != "9.0":
        pytest.skip("needs compute capability 9.0")
    prepared, weight = layer(mode, n=512, k=1024)
    theirs = prepare(prepared.problem, [weight], [None], torch.device("cuda"), None)
    for name, tensor in theirs.tensors.items():
        assert_bitwise_equal(prepared.tensors[name], tensor, name)
    call = dispatch.number_of(((64, KERNEL), (None, cublas)), [prepared])
    for rows in (1, 16, 64, 128, 512):
        x = inputs(rows, k=1024)
        y = dispatch.run(x, None, list(prepared.tensors.values()), call)
        if rows <= 64:
            check_product(x, y, weight, f"{rows} rows")
        else:
            assert_bitwise_equal(y, cublas.apply(x, theirs, None), f"{rows} rows")
            exact = x.double() @ weight.dequantize().double().to("cuda").t()
            assert float((y.double() - exact).norm() / exact.norm()) < 2**-4  # x is rounded to three bits of mantissa
