"""The layout of FP8 experts row by row: what fits, what it holds, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantplug.activations import read_activation
from quantplug.expertrowprepare import dequantize, prepare_experts, unprepare
from quantplug.expertrows import LAYOUT_ID, bytes_held, refuse, turns
from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.spec import ElementType, PerChannel, PerTensor, WeightSpec
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.compare import assert_bitwise_equal

CPU = torch.device("cpu")
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
TOKEN, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/tensor/static"
PROBLEM = MoEProblem(
    3, 2, 40, 24, (ROWS, ROWS), ROWS, ExpertFunction(), "bfloat16", activation=read_activation(TOKEN, "here")
)


def weight(n: int, k: int, spec: WeightSpec, seed: int) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(n if isinstance(spec.granularity, PerChannel) else 1, 1, generator=generator)
    return Weight(codes, scales.to(getattr(torch, spec.scale_dtype)), spec)


def experts(problem: MoEProblem) -> list[ExpertWeights]:
    between, hidden = problem.intermediate, problem.hidden
    stored = ActivationParams(torch.tensor(0.5)) if turns(problem) > 1 else None
    return [
        ExpertWeights(
            tuple(weight(between, hidden, spec, 10 * number + part) for part, spec in enumerate(problem.w13)),
            weight(hidden, between, problem.w2, 10 * number + 5),
            a13=(stored,) * len(problem.w13),
            a2=stored,
        )
        for number in range(problem.experts)
    ]


@pytest.mark.parametrize("activation", [TOKEN, STATIC])
@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=["rows", "one"])
def test_experts_come_back_bit_by_bit_and_take_the_bytes_that_are_told(activation, granularity):
    spec = replace(ROWS, granularity=granularity)
    problem = replace(PROBLEM, w13=(spec, spec), w2=spec, activation=read_activation(activation, "here"))
    given = experts(problem)
    made = prepare_experts(problem, given, CPU, None)
    assert made.layout_id == LAYOUT_ID
    assert refuse(problem) is None
    assert sum(tensor.nbytes for tensor in made.tensors.values()) == bytes_held(problem)
    for number, expert in enumerate(given):
        back = unprepare(made, number)
        first, second = dequantize(made, number)
        assert_bitwise_equal(second, expert.w2.dequantize(torch.float32), "down")
        wanted = torch.cat([part.dequantize(torch.float32) for part in expert.w13])
        assert_bitwise_equal(first, wanted, "gate and up")
        for was, found in zip((*expert.w13, expert.w2), (*back.w13, back.w2), strict=True):
            assert_bitwise_equal(found.codes.view(torch.uint8), was.codes.view(torch.uint8), "codes")
            assert_bitwise_equal(found.scales, was.scales, "scales")


def test_what_is_prepared_is_overwritten_in_place():
    given = experts(PROBLEM)
    made = prepare_experts(PROBLEM, given[::-1], CPU, None)
    held = {name: tensor.data_ptr() for name, tensor in made.tensors.items()}
    again = prepare_experts(PROBLEM, given, CPU, made)
    assert again is made
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == held
    assert_bitwise_equal(dequantize(again, 0)[1], given[0].w2.dequantize(torch.float32), "down of the first")


def test_what_would_not_come_back_says_so_and_what_is_missing_is_named():
    wide = replace(ROWS, scale_dtype="float64")
    given = [
        replace(expert, w2=Weight(expert.w2.codes, expert.w2.scales.to(torch.float64), wide))
        for expert in experts(PROBLEM)
    ]
    with pytest.raises(NotImplementedError, match="no exact way back"):
        unprepare(prepare_experts(PROBLEM, given, CPU, None), 0)
    static = replace(PROBLEM, activation=read_activation(STATIC, "here"))
    with pytest.raises(ValueError, match="w13 of expert 0"):
        prepare_experts(static, experts(PROBLEM), CPU, None)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"top_k": 0}, "shape", "top_k is 0"),
        ({"router_weight_on_input": True}, "shape", "top_k 2 with"),
        ({"w2": replace(ROWS, element=ElementType.FLOAT8_E5M2)}, "element", "float8_e5m2"),
        ({"activation": read_activation("float8_e4m3fn/tensor/dynamic", "here")}, "activation", "tensor, dynamic"),
    ],
)
def test_what_does_not_fit_is_named(changes, code, words):
    refusal = refuse(replace(PROBLEM, **changes))
    assert refusal is not None
    assert refusal.code == code
    assert words in refusal.reason
