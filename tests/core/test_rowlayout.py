"""The layout of products in FP8: what shares a part, how it is filled up, and the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantplug.activations import read_activation
from quantplug.kernel import Rejected
from quantplug.rowlayout import bytes_held, mode_of, refuse, width
from quantplug.rowprepare import dequantize, prepare, unprepare
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug.weight import ActivationParams, Prepared, Weight
from quantplug_testkit.canonical import make_weight
from quantplug_testkit.compare import assert_bitwise_equal

CPU = torch.device("cpu")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
ROWS = replace(WHOLE, granularity=PerChannel())
BLOCKS = replace(WHOLE, granularity=PerBlock(128, 128))
TENSOR, STATIC = "float8_e4m3fn/tensor/dynamic", "float8_e4m3fn/tensor/static"
TOKEN, GROUP = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic"


def problem(spec: WeightSpec, sizes: tuple[int, ...], activation: str, k: int = 96) -> LinearProblem:
    segments = tuple(SegmentSpec(size, spec) for size in sizes)
    return LinearProblem(k, segments, "bfloat16", activation=read_activation(activation, "here"))


def weights(asked: LinearProblem) -> list[Weight]:
    generator = np.random.default_rng(0)
    return [make_weight(s.weight, s.out_features, asked.in_features, generator) for s in asked.segments]


def stored(*scales: float) -> list[ActivationParams]:
    return [ActivationParams(torch.tensor(scale, dtype=torch.float32)) for scale in scales]


def prepared(
    asked: LinearProblem, params: list[ActivationParams] | None = None, out: Prepared | None = None
) -> Prepared:
    return prepare(asked, weights(asked), params or [None] * len(asked.segments), CPU, out)


@pytest.mark.parametrize(
    ("spec", "sizes", "activation", "scales", "parts"),
    [
        (WHOLE, (64, 32), STATIC, (0.01, 0.01), 1),
        (WHOLE, (64, 32), STATIC, (0.01, 0.02), 2),
        (ROWS, (64, 32), TOKEN, None, 1),
        (BLOCKS, (256, 128, 40), GROUP, None, 1),
        (BLOCKS, (200, 128), GROUP, None, 2),
    ],
)
def test_segments_share_a_part_where_they_can_and_come_back(spec, sizes, activation, scales, parts):
    asked = problem(spec, sizes, activation)
    made = prepared(asked, None if scales is None else stored(*scales))
    assert (made.layout_id, made.meta["parts"]) == ("fp8.rows", parts)
    assert made.nbytes <= bytes_held(asked)
    for found, given in zip(unprepare(made), weights(asked), strict=True):
        assert_bitwise_equal(found.codes, given.codes, "codes")
        assert_bitwise_equal(found.scales, given.scales, "scales")


@pytest.mark.parametrize(
    ("asked", "mode", "inputs", "scales"),
    [
        (problem(WHOLE, (33,), TENSOR, 61), "tensor", 64, (1, 1)),
        (problem(WHOLE, (33,), TOKEN, 61), "row", 64, (1, 1)),
        (problem(WHOLE, (33, 20), TOKEN, 61), "row", 64, (1, 64)),
        (problem(ROWS, (33,), TOKEN, 64), "row", 64, (1, 48)),
        (problem(BLOCKS, (200,), GROUP, 640), "block", 1024, (8, 2)),
    ],
)
def test_codes_lie_row_by_row_and_zeros_fill_them_up(asked, mode, inputs, scales):
    made, given = prepared(asked), weights(asked)
    rows = sum(weight.out_features for weight in given)
    codes = made.tensors["codes.0"].view(torch.uint8)
    assert mode_of(asked) == mode
    assert codes.shape == (-(-rows // 16) * 16, inputs)
    assert width(asked) == inputs
    assert torch.equal(codes[:rows, : asked.in_features], torch.cat([w.codes.view(torch.uint8) for w in given]))
    assert not codes[rows:].any()
    assert not codes[:, asked.in_features :].any()
    assert made.tensors["scales.0"].shape == scales
    assert ("one" in made.tensors) == (mode == "row")


def test_the_scale_of_a_block_stands_at_its_inputs_and_rows():
    asked = problem(BLOCKS, (200,), GROUP, 640)
    scales, (weight,) = prepared(asked).tensors["scales.0"], weights(asked)
    assert scales.stride(0) == 1
    assert torch.equal(scales[:5].t(), weight.scales)
    assert not scales[5:].any()


def test_equal_segments_may_not_become_different_ones_in_place():
    asked = problem(WHOLE, (64, 32), STATIC)
    made = prepared(asked, stored(0.01, 0.01))
    assert prepared(asked, stored(0.03, 0.03), out=made) is made
    assert float(made.tensors["x_scale.0"]) == pytest.approx(0.03)
    with pytest.raises(ValueError, match=r"codes\.1, .*, not codes\.0, .* as before"):
        prepared(asked, stored(0.01, 0.02), out=made)


def test_a_stored_scale_that_is_missing_is_named():
    with pytest.raises(ValueError, match="a stored scale of x is missing: "):
        prepared(problem(WHOLE, (64, 32), STATIC), [*stored(0.01), None])


def test_scales_in_float64_are_rounded_and_have_no_way_back():
    asked = problem(ROWS, (32,), TOKEN)
    (weight,) = weights(asked)
    exact = replace(weight, scales=weight.scales.double() / 3)
    made = prepare(asked, [exact], [None], CPU, None)
    assert torch.equal(dequantize(made, torch.float32), exact.dequantize())
    with pytest.raises(NotImplementedError, match=r"fp8\.rows holds float64 scales in float32"):
        unprepare(made)


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (problem(ROWS, (16,), "none"), "activation", "permits none"),
        (problem(ROWS, (16,), GROUP), "activation", "group 128, dynamic for float8_e4m3fn per channel"),
        (problem(BLOCKS, (16,), TOKEN), "activation", "per token, dynamic for float8_e4m3fn block"),
        (problem(replace(ROWS, element=ElementType.INT8), (16,), TOKEN), "element", "codes are int8"),
        (problem(replace(BLOCKS, granularity=PerBlock(64, 64)), (16,), GROUP), "granularity", "blocks of 64 x 64"),
        (problem(ROWS, (16,), TOKEN, 0), "shape", "in_features is 0"),
    ],
)
def test_a_refusal_names_what_does_not_fit(asked, code, words):
    refusal = refuse(asked)
    assert isinstance(refusal, Rejected)
    assert refusal.code == code
    assert words in refusal.reason


def test_what_fits_is_not_refused():
    for spec, activation in ((WHOLE, STATIC), (WHOLE, TOKEN), (ROWS, TENSOR), (BLOCKS, GROUP)):
        assert refuse(problem(spec, (33, 64), activation)) is None
