"""The CUDA C++ kernel in graphs, on two streams, through the compiler, and cut as other devices cut it."""

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
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.weight import Prepared, Weight
from quantplug_testkit.canonical import make_weight
from quantplug_testkit.compare import assert_bitwise_equal

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_marlin import launch
from quantplug_marlin.calls import form_of_part
from quantplug_marlin.cut import Cut, GroupCut
from quantplug_marlin.device import target_of
from quantplug_marlin.kernel import MarlinKernel

KERNEL = MarlinKernel()
N, K = 1040, 1088  # 65 tiles, 17 chunks
SPECS = {
    "int4": WeightSpec(ElementType.INT4, PerGroup(64)),
    "uint4 act-order": WeightSpec(ElementType.UINT4, PerGroup(64), act_order=True),
    "mxfp8": WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu"),
}


def layer(name: str, dtype: str = "bfloat16", in_features: int = K) -> tuple[Prepared, Weight]:
    spec = SPECS[name]
    weight = make_weight(spec, N, in_features, np.random.default_rng(0))
    problem = LinearProblem(in_features, (SegmentSpec(N, spec),), dtype)
    return KERNEL.prepare(problem, [weight], [None], torch.device("cuda")), weight


def inputs(rows: int, in_features: int = K) -> torch.Tensor:
    return torch.randn(rows, in_features, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [1, 16, 33, 130])
def test_a_graph_gives_what_plain_calls_give_also_for_other_inputs(name: str, rows: int) -> None:
    check_graph(KERNEL, *layer(name), lambda: inputs(rows), f"{name}, {rows} rows")


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    prepared, _ = layer("int4")
    for rows in (1, 40):
        check_two_streams(KERNEL, prepared, partial(inputs, rows), calls=100)


def test_a_chain_of_layers_reads_what_the_one_before_has_written() -> None:
    spec = SPECS["int4"]
    weights = [make_weight(spec, K, K, np.random.default_rng(seed)) for seed in range(6)]
    problem = LinearProblem(K, (SegmentSpec(K, spec),), "bfloat16")
    layers = [KERNEL.prepare(problem, [weight], [None], torch.device("cuda")) for weight in weights]
    check_chain(KERNEL, layers, inputs)


@pytest.mark.parametrize("name", SPECS)
def test_the_operators_keep_torchs_rules(name: str) -> None:
    prepared, _ = layer(name)
    weight = [prepared.tensors.get(f"{part}.0") for part in ("codes", "scales", "zeros", "factor", "columns")]
    form = prepared.meta["form.0"]
    torch.library.opcheck(torch.ops.quantplug_marlin.linear.default, (inputs(3), *weight, None, N, form))
    torch.library.opcheck(torch.ops.quantplug_marlin.dequantize.default, (*weight, N, K, form, False, torch.bfloat16))


def test_the_compiler_sees_one_operator() -> None:
    prepared, _ = layer("int4")
    x = inputs(3)
    compiled = torch.compile(lambda given: KERNEL.apply(given, prepared, None), fullgraph=True)
    assert torch.equal(compiled(x), KERNEL.apply(x, prepared, None))


class Seen(TorchDispatchMode):
    """What operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_operator_is_called_where_somebody_sees_it_and_not_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's way to it takes as long on the host as a small product on the GPU."""
    prepared, _ = layer("int4")
    x, operator = inputs(3), "quantplug_marlin.linear.default"
    wanted = KERNEL.apply(x, prepared, None)
    with Seen() as seen:
        assert_bitwise_equal(KERNEL.apply(x, prepared, None), wanted, "y while operators are watched")
    assert seen.names.count(operator) == 1
    traced = make_fx(lambda given: KERNEL.apply(given, prepared, None))(x)
    assert operator in traced.code
    called = []
    monkeypatch.setattr(launch, "linear", lambda *given: called.append(len(given)) or wanted)
    KERNEL.apply(x.clone().requires_grad_(), prepared, None)
    with torch.device("cuda"):
        KERNEL.apply(x, prepared, None)
    KERNEL.apply(torch.nn.Parameter(x, requires_grad=False), prepared, None)
    assert len(called) == 3
    KERNEL.apply(x, prepared, None)
    with torch.inference_mode():
        KERNEL.apply(x, prepared, None)
    assert len(called) == 3


def test_transformations_see_the_operator_and_a_tangent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, _ = layer("int4")
    x, called = inputs(3), []
    monkeypatch.setattr(launch, "linear", lambda given, *_: called.append(1) or given.new_zeros(given.shape[0], N))
    torch.func.vmap(lambda row: KERNEL.apply(row[None], prepared, None))(x)
    torch.func.grad(lambda given: KERNEL.apply(given, prepared, None).sum())(x)
    assert len(called) == 2
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            KERNEL.apply(dual, prepared, None)
        KERNEL.apply(x, prepared, None)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(lambda given: KERNEL.apply(given, prepared, None), (x,), (x,))
    assert len(called) == 2


CUTS = (
    Cut(2, 8, 1, 16, 4),
    Cut(4, 16, 2, 4, 3, shares=2),
    Cut(2, 64, 4, 2, 4),
    Cut(2, 64, 4, 2, 4, splits=3),
    Cut(1, 16, 1, 4, 2, splits=5),
    GroupCut(2, 32, 1, 1, 4, shares=8),
    GroupCut(1, 64, 1, 1, 3, shares=2),
    GroupCut(2, 128, 1, 1, 5),
    GroupCut(2, 48, 1, 1, 2, most=3),
)
"""Those, too, that no device would choose."""


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", ["int4", "mxfp8"])
def test_every_way_to_cut_a_product_gives_it(name: str, cut: Cut | GroupCut) -> None:
    if (isinstance(cut, GroupCut) and not target_of(0).warpgroups) or (cut.shares > 1 and not target_of(0).clusters):
        pytest.skip("needs compute capability 9.0")
    check_cut(name, cut, K)


def check_cut(name: str, cut: Cut | GroupCut, in_features: int) -> None:
    prepared, weight = layer(name, in_features=in_features)
    form = form_of_part(prepared, 0)
    codes, scales = prepared.tensors["codes.0"], prepared.tensors["scales.0"]
    stream = torch.cuda.current_stream().cuda_stream
    for rows in (1, 7, 65):
        way = launch.way(form, cut, N, codes.shape[0], codes.shape[1], rows, 0, stream)
        x, y = inputs(rows, in_features), torch.full((rows, N), torch.nan, dtype=torch.bfloat16, device="cuda")
        launch.run(way, x, codes, scales, None, None, None, y)
        check_product(x, y, weight, f"{cut}, {rows} rows")


def test_nothing_is_compiled_by_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_calls_compile_nothing(KERNEL, layer("int4")[0], inputs, launch, monkeypatch)
