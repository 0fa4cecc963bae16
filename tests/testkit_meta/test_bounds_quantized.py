"""The bound where x is quantized: sums of integers with the scales outside stay inside, one wrong code does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.activations import read_activation
from quantplug.spec import ElementType, PerChannel, PerGroup, PerTensor, WeightSpec
from quantplug.weight import ActivationParams
from quantplug_testkit import strategies
from quantplug_testkit.activation import make_activation, quantized
from quantplug_testkit.bounds import gamma, linear_bound
from quantplug_testkit.canonical import make_weight, segment_of, to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.oracles.linear import fused_linear
from quantplug_testkit.quantizing import dynamic_scale, fake_quantize, largest, nearest

INTEGER = ("int8/token/dynamic", "int8/tensor/dynamic", "int8/tensor/static", "uint8/tensor/static")


def integer_product(x, weight, bias, spec, params):
    """Codes times codes in integers, group by group, then one scale after the other in float32."""
    scale = params.scale if params.scale is not None else dynamic_scale(largest(x.float(), spec), spec, None)
    codes = nearest(x.float() / scale, spec.element, params.zero).to(torch.int64)
    values = weight.codes.to(torch.int64)
    scales, zeros = (shared.expand(weight.out_features, -1) for shared in (weight.scales.float(), zeros_of(weight)))
    y = torch.zeros(x.shape[0], weight.out_features)
    for group in range(scales.shape[1]):
        inputs = weight.group_index() == group
        sums = codes[:, inputs] @ (values[:, inputs] - zeros[:, group : group + 1]).t()
        y += sums.to(torch.float32) * scales[:, group]
    y = y * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def zeros_of(weight):
    return torch.zeros_like(weight.scales, dtype=torch.int64) if weight.zeros is None else weight.zeros.to(torch.int64)


def held_against(x, weight, bias, spec, params, y):
    operand = quantized(to_float64(x), spec, params)
    segment, b = segment_of(weight), None if bias is None else to_float64(bias)
    bound = linear_bound([operand], [segment], b, str(x.dtype).removeprefix("torch."))
    assert_within(y, fused_linear([operand.values], [segment.values()], b), bound)


@given(st.data(), st.sampled_from(INTEGER), st.sampled_from(strategies.DTYPES), st.booleans())
@settings(max_examples=150, deadline=None)
def test_scales_may_multiply_sums_of_integers(data, text, dtype, with_bias):
    """A kernel that adds up in int32 keeps the bound of one that multiplies numbers."""
    in_features, out_features = data.draw(strategies.sizes(48)), data.draw(strategies.sizes(24))
    granularity = data.draw(st.sampled_from([PerTensor(), PerChannel(), PerGroup(16)]))
    element = data.draw(strategies.element_types(bits=(4, 8)))
    weight = data.draw(strategies.weights(WeightSpec(element, granularity, "float32"), out_features, in_features))
    x = data.draw(strategies.inputs((3, in_features), dtype))
    bias = data.draw(strategies.inputs((out_features,), dtype)) if with_bias else None
    spec = read_activation(text, "here")
    params = make_activation(spec, data.draw(strategies.seeds())) or ActivationParams()
    held_against(x, weight, bias, spec, params, integer_product(x, weight, bias, spec, params))


@pytest.mark.parametrize("text", [*INTEGER, "float8_e4m3fn/token/dynamic", "float8_e4m3fn/tensor/static"])
def test_one_code_off_by_one_leaves_the_bound(text):
    """In float32, where the result's own rounding hides nothing: there is no room for a wrong code."""
    spec = read_activation(text, "here")
    generator = np.random.default_rng(4)
    params = make_activation(spec, generator) or ActivationParams()
    weight = make_weight(WeightSpec(ElementType.INT8, PerChannel(), "float32"), 32, 64, generator)
    x = torch.from_numpy(generator.standard_normal((8, 64))).float()
    right = fake_quantize(x, spec, params)
    held_against(x, weight, None, spec, params, right @ weight.dequantize().t())
    wrong = right.clone()
    # the next value that occurs is the next code, or one not far from it
    row = right[3].unique()
    place = int((row == right[3, 7]).nonzero())
    wrong[3, 7] = row[place - 1] if place else row[1]
    with pytest.raises(AssertionError, match="leave the bound"):
        held_against(x, weight, None, spec, params, wrong @ weight.dequantize().t())


def test_x_that_is_not_quantized_leaves_the_bound():
    """And so does the other way round: what is declared is what is compared."""
    spec = read_activation("int8/token/dynamic", "here")
    weight = make_weight(WeightSpec(ElementType.INT8, PerChannel(), "float32"), 32, 64, np.random.default_rng(4))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = (x.float() @ weight.dequantize().t()).bfloat16()
    with pytest.raises(AssertionError, match="leave the bound"):
        held_against(x, weight, None, spec, ActivationParams(), y)


def test_the_terms_add_up_as_written():
    """A worked example: x = 2.5 on a boundary between codes of 1, one weight of 3 * 0.5, a float32 result."""
    spec = read_activation("int8/tensor/static", "here")
    weight = make_weight(WeightSpec(ElementType.INT8, PerTensor(), "float32"), 1, 1, np.random.default_rng(0))
    weight.codes[:], weight.scales[:] = 3, 0.5
    operand = quantized(np.array([[2.5]]), spec, ActivationParams(torch.tensor(1.0)))
    assert (operand.values.tolist(), operand.error.tolist()) == ([[2.0]], [[1.0]])
    bound = linear_bound([operand], [segment_of(weight)], None, "float32")
    # six roundings: four as for any x, one for its scale, one for the sum of integers
    accumulated = (gamma(6, 2.0**-24) + gamma(6, 2.0**-53)) * (2 + 1) * 1.5 + 2.0**-126 * (2 + 1 + 6)
    error = accumulated + 1.0 * 1.5
    assert bound.tolist() == [[pytest.approx(error + 2.0**-24 * (3 + error) + 2.0**-150, rel=1e-15)]]
