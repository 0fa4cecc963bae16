"""Measuring kernels for experts: what is right is timed, what is wrong is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.moeloop import LoopKernel
from quantplug.platform import Platform
from quantplug.reference import ReferenceKernel
from quantplug.spec import ActivationSpec, ElementType, PerChannel, PerGroup, WeightSpec
from quantplug.trialexperts import ExpertWorkload
from quantplug_testkit.quantizing import QuantizingKernel

CPU, DEVICE = Platform.parse("cpu"), torch.device("cpu")
E = ElementType
UINT4 = WeightSpec(E.UINT4, PerGroup(32))
INT8 = WeightSpec(E.INT8, PerChannel(), "float32")
MXFP4 = WeightSpec(E.FLOAT4_E2M1FN, PerGroup(32), "float8_e8m0fnu")
NVFP4 = WeightSpec(E.FLOAT4_E2M1FN, PerGroup(16), "float8_e4m3fn", global_scale=True)
SILU = ExpertFunction()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(spec=UINT4, function=SILU, **other):
    given = {"dtype": "bfloat16", "bias": True, **other}
    return MoEProblem(6, given.pop("top_k", 2), 64, 32, (spec,) * (2 if function.gated else 1), spec, function, **given)


def attempt(kernel, asked, rows=(1, 3, 20)):
    verdict = kernel.supports(asked, CPU)
    assert isinstance(verdict, Accepted)
    return ExpertWorkload(asked, DEVICE, rows, 0.001).run(kernel, verdict)


@pytest.mark.parametrize("spec", [UINT4, MXFP4, NVFP4], ids=lambda spec: spec.describe())
@pytest.mark.parametrize(
    "function",
    [
        SILU,
        ExpertFunction(limit=7.0, alpha=1.702, up_offset=1.0),
        ExpertFunction("gelu"),
        ExpertFunction("gelu_tanh"),
        ExpertFunction("relu", gated=False),
        ExpertFunction("relu2", gated=False),
    ],
    ids=ExpertFunction.describe,
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_right_kernel_is_timed_for_each_number_of_rows(spec, function, dtype):
    trial = attempt(LoopKernel(ReferenceKernel()), problem(spec, function, dtype=dtype))
    assert trial.wrong == ""
    assert [rows for rows, _ in trial.us] == [1, 3, 20]


@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec(E.INT8, "token", dynamic=True),
        ActivationSpec(E.INT8, "tensor", dynamic=False),
        ActivationSpec(E.FLOAT8_E4M3FN, "token", dynamic=True),
        ActivationSpec(E.FLOAT8_E4M3FN, "group", dynamic=True, group_size=32, scale_dtype="float8_e8m0fnu"),
    ],
    ids=ActivationSpec.describe,
)
def test_what_lies_between_the_products_may_be_quantized_where_the_file_permits(activation):
    kernel = LoopKernel(QuantizingKernel())
    assert attempt(kernel, problem(INT8, activation=activation)).wrong == ""


def test_the_routers_weight_may_be_on_the_input():
    asked = problem(top_k=1, router_weight_on_input=True)
    assert attempt(LoopKernel(ReferenceKernel()), asked).wrong == ""
    wrong = attempt(
        Broken(router_weight_on_input=lambda problem: replace(problem, router_weight_on_input=False)), asked
    )
    assert "y[0, " in wrong.wrong


class Broken(LoopKernel):
    def __init__(self, break_y=None, break_ids=None, break_weights=None, **change):
        super().__init__(ReferenceKernel())
        self.breaks = break_y, break_ids, break_weights
        self.change = change

    def apply(self, x, topk_weights, topk_ids, prepared, expert_map=None):
        break_y, break_ids, break_weights = self.breaks
        for change in self.change.values():
            prepared = replace(prepared, problem=change(prepared.problem))
        ids = topk_ids if break_ids is None else break_ids(topk_ids)
        weights = topk_weights if break_weights is None else break_weights(topk_weights)
        y = super().apply(x, weights, ids, prepared, expert_map)
        return y if break_y is None else break_y(y)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Broken(break_ids=lambda ids: (ids + 1) % 6), "y[0, "),
        (Broken(break_ids=lambda ids: ids.flip(1)), "y[0, "),
        (Broken(break_weights=torch.ones_like), "y[0, "),
        (Broken(function=lambda problem: replace(problem, function=ExpertFunction("relu"))), "y[0, "),
        (Broken(lambda y: y.roll(1, 0)), "with 3 rows, y[0, "),
        (Broken(lambda y: torch.cat([y[:-1], y[-1:] * 0]) if len(y) > 16 else y), "with 20 rows, y[19, "),
        (Broken(lambda y: y.float()), "y is [1, 64] in torch.float32"),
        (Broken(lambda y: y.missing), "raised AttributeError"),
    ],
)
def test_a_wrong_kernel_is_found_and_not_timed(broken, says):
    trial = attempt(broken, problem(dtype="float32") if "float32" not in says else problem())
    assert says in trial.wrong
    assert trial.us == ()
