"""
Decoding and encoding: the oracle's values and the same bytes, for every code, granularity, shape and spelling.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from fp8_files import ELEMENTS, expanded, finite_bytes, float8, octets, stored_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import ConvertError
from quantplug.spec import ActivationSpec, ElementType, LinearShape, PerBlock, PerChannel, PerGroup, PerTensor
from quantplug.weight import ActivationParams, Weight
from quantplug_fp8.scheme import FP8Scheme
from quantplug_testkit.oracles import floats

SIZES = (1, 2, 3, 16, 64, 128, 200)
strategies = st.one_of(
    st.just({"strategy": "tensor"}),
    st.just({"strategy": "channel"}),
    st.builds(lambda size: {"strategy": "group", "group_size": size}, st.sampled_from(SIZES)),
    st.builds(
        lambda n, k: {"strategy": "block", "block_n": n, "block_k": k}, st.sampled_from(SIZES), st.sampled_from(SIZES)
    ),
)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@settings(max_examples=200, deadline=None)
@given(
    params=strategies,
    element=st.sampled_from(ELEMENTS),
    dtype=st.sampled_from(SCALES),
    name=st.sampled_from(["weight_scale", "weight_scale_inv"]),
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_decode_gives_the_oracles_values_and_encode_the_same_bytes(params, element, dtype, name, n, k, seed, data):
    """Any tile, cut off or not, any shape that writers give the scales, any dtype: kept, and back without a change."""
    if dtype is torch.float8_e8m0fnu and params["strategy"] in ("tensor", "channel"):
        dtype = torch.bfloat16
    spelled = {**params, "element": element, "scale_name": name}
    spec = FP8Scheme.build(spelled, "test").params(LinearShape(n, k))[1]
    shape = data.draw(st.sampled_from([spec.shape, *spec.other_shapes]))
    layer = stored_layer(n, k, seed, scale_dtype=dtype, scale_shape=shape, **spelled)
    sizes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()}
    assert layer.scheme.shape_of(sizes, "layer") == layer.shape

    before = {suffix: tensor.clone() for suffix, tensor in layer.tensors.items()}
    weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.spec.scale_dtype == str(dtype).removeprefix("torch.")
    assert np.array_equal(weight.dequantize().numpy(), layer.values())
    assert weight.codes.data_ptr() == layer.tensors["weight"].data_ptr(), "the stored weight is canonical: no copy"
    encoded = layer.scheme.encode(weight)
    assert encoded.keys() == before.keys()
    assert np.array_equal(octets(encoded["weight"]), octets(before["weight"]))
    assert encoded[name].dtype == dtype
    assert torch.equal(encoded[name].reshape(shape).float(), before[name].float())
    assert torch.equal(layer.tensors[name].float(), before[name].float()), "the caller's tensor was modified"


FLOATS = st.floats(2.0**-100, 2.0**100, width=32)


@settings(max_examples=200, deadline=None)
@given(params=strategies, element=st.sampled_from(ELEMENTS), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_scales_that_divide(params, element, data, seed):
    """
    Values are the oracle's, within a unit in the last place of the quotient; the stored numbers come back to the bit.
    """
    n, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    spelled = {**params, "element": element, "scale_name": "weight_scale_inv", "inverse": True}
    spec = FP8Scheme.build(spelled, "test").params(LinearShape(n, k))[1]
    assert spec.dtypes == ("float32",)
    layer = stored_layer(
        n, k, seed, scale_shape=data.draw(st.sampled_from([spec.shape, *spec.other_shapes])), **spelled
    )
    layer.tensors["weight_scale_inv"].flatten()[0] = data.draw(FLOATS)
    before = layer.tensors["weight_scale_inv"].clone()
    weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
    assert (weight.spec.scale_dtype, weight.scales.dtype) == ("float32", torch.float64)
    values = weight.dequantize()
    assert np.array_equal(values.numpy(), layer.values())
    codes = floats.decode(octets(layer.tensors["weight"]), element)
    quotients = torch.from_numpy((codes / expanded(before.double().numpy(), spelled, n, k)).astype(np.float32))
    assert int((values.view(torch.int32) - quotients.view(torch.int32)).abs().max()) <= 1
    assert torch.equal(layer.tensors["weight_scale_inv"], before), "the caller's tensor was modified"
    encoded = layer.scheme.encode(weight)
    assert np.array_equal(octets(encoded["weight"]), octets(layer.tensors["weight"]))
    assert torch.equal(encoded["weight_scale_inv"].reshape(before.shape), before)


def test_scales_that_divide_are_told_apart_and_only_read():
    """A plan says so; float32 reciprocals cannot tell what was stored, and no dense weight is written in this form."""
    layer = stored_layer(8, 16, inverse=True, scale_name="weight_scale_inv")
    assert layer.scheme.describe() == "fp8 e4m3fn per channel, scales divide"
    assert layer.scheme.divisors == {"weight_scale_inv"}
    assert stored_layer(8, 16).scheme.divisors == frozenset()
    weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
    with pytest.raises(ConvertError, match="cannot store scales in torch") as caught:
        layer.scheme.encode(Weight(weight.codes, weight.scales.float(), weight.spec))
    assert caught.value.code == "QP-CONV-SPEC"
    with pytest.raises(ConvertError, match="reciprocals, which are read only") as caught:
        layer.scheme.quantize(torch.ones(8, 16))
    assert caught.value.code == "QP-CONV-SCHEME"


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code(element):
    """All bytes that are numbers, both zeros, subnormals and the largest among them, against the oracle's table."""
    codes = finite_bytes(element)
    assert len(codes) == {"float8_e4m3fn": 254, "float8_e5m2": 248}.get(element, 255)
    scheme = FP8Scheme.build({"strategy": "tensor", "element": element}, "test")
    tensors = {"weight": float8(codes[None], element), "weight_scale": torch.tensor([0.5])}
    weight = scheme.decode(tensors, LinearShape(1, len(codes)), "layer")
    expected = floats.values(element)[codes] * 0.5
    assert np.array_equal(weight.dequantize(torch.float64)[0].numpy(), expected)
    assert np.array_equal(np.signbit(weight.dequantize()[0].numpy()), np.signbit(expected))
    assert np.array_equal(octets(scheme.encode(weight)["weight"])[0], codes)


def test_powers_of_two_as_scales_from_the_smallest_on():
    """Byte 0 of float8_e8m0fnu is 2^-127, a subnormal float32, and not 0."""
    scales = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)[:, None]
    scheme = FP8Scheme.build({"strategy": "block", "block_n": 1, "block_k": 4}, "test")
    tensors = {"weight": torch.ones(255, 4).to(torch.float8_e4m3fn), "weight_scale": scales}
    weight = scheme.decode(tensors, LinearShape(255, 4), "layer")
    assert np.array_equal(weight.dequantize(torch.float64)[:, 0].numpy(), floats.values("float8_e8m0fnu")[:255])


def test_static_activations_come_with_their_scale_in_float32():
    """BF16 `[1]` and a scalar alike; dynamic ones store nothing."""
    static = {"strategy": "tensor", "activation": "float8_e4m3fn/tensor/static"}
    layer = stored_layer(8, 16, **static)
    for stored in (torch.tensor([0.0124], dtype=torch.bfloat16), torch.tensor(0.5)):
        layer.tensors["input_scale"] = stored
        layer.scheme.shape_of({name: tuple(tensor.shape) for name, tensor in layer.tensors.items()}, "layer")
        weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
        found = layer.scheme.decode_activation(layer.tensors, "layer")
        assert (found.scale.dtype, found.scale.shape) == (torch.float32, ())
        assert float(found.scale) == float(stored)
        assert float(layer.scheme.encode(weight, found)["input_scale"]) == float(stored)
        with pytest.raises(ConvertError, match="without a scale of x") as caught:
            layer.scheme.encode(weight)
        assert caught.value.code == "QP-CONV-SPEC"
    assert layer.scheme.required_suffixes == {"weight", "weight_scale", "input_scale"}
    dynamic = stored_layer(8, 16, activation="float8_e4m3fn/token/dynamic")
    assert dynamic.scheme.decode_activation(dynamic.tensors, "layer") is None
    assert dynamic.scheme.encode(dynamic.scheme.decode(dynamic.tensors, dynamic.shape, "layer"), ActivationParams())


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("x", ["input_scale", "activation_scale"])
def test_a_configuration_that_does_not_say_how_scales_are_called(scale, x):
    """The file has one spelling of each; it is read, and can be written back under the name that the file has."""
    params = {"strategy": "tensor", "scale_name": "either", "activation": "float8_e4m3fn/tensor/static"}
    layer = stored_layer(8, 16, name=scale, **params)
    layer.tensors[x] = layer.tensors.pop("input_scale")
    assert layer.scheme.shape_of({name: tuple(t.shape) for name, t in layer.tensors.items()}, "layer") == layer.shape
    weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
    found = layer.scheme.decode_activation(layer.tensors, "layer")
    assert np.array_equal(weight.dequantize().numpy(), layer.values())
    encoded = layer.scheme.encode(weight, found)
    assert all(torch.equal(encoded[name].float(), tensor.float()) for name, tensor in layer.tensors.items())
    assert layer.scheme.required_suffixes == {"weight"}


@pytest.mark.parametrize(
    ("params", "words", "granularity", "activation"),
    [
        ({}, "fp8 e4m3fn per channel", PerChannel(), None),
        ({"strategy": "tensor", "element": "float8_e5m2"}, "fp8 e5m2 per tensor", PerTensor(), None),
        ({"strategy": "group", "group_size": 64}, "fp8 e4m3fn group 64", PerGroup(64), None),
        (
            {"strategy": "block", "activation": "float8_e4m3fn/group128/dynamic"},
            "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic",
            PerBlock(128, 128),
            ActivationSpec(ElementType.FLOAT8_E4M3FN, "group", dynamic=True, group_size=128),
        ),
        (
            {"strategy": "tensor", "activation": "float8_e4m3fn/tensor/static"},
            "fp8 e4m3fn per tensor, x float8_e4m3fn per tensor, static",
            PerTensor(),
            ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False),
        ),
    ],
)
def test_the_contract_and_its_words(params, words, granularity, activation):
    """What a plan shows, and what kernels are asked about."""
    scheme = FP8Scheme.build(params, "test")
    assert scheme.describe() == words
    assert scheme.weight_spec().granularity == granularity
    assert scheme.activation_spec() == activation
    assert scheme.weight_spec().scale_dtype == "float32"


def test_params_declare_axes_for_splitting():
    """Rows of a column-parallel, inputs of a row-parallel layer; a scale per tensor belongs to all parts."""

    def axes(**params):
        specs = FP8Scheme.build(params, "test").params(LinearShape(256, 576))
        assert (specs[0].suffix, specs[0].output_axis, specs[0].input_axis) == ("weight", 0, 1)
        return specs[1].shape, specs[1].output_axis, specs[1].input_axis

    assert axes(strategy="tensor") == ((1,), None, None)
    assert axes(strategy="channel") == ((256, 1), 0, None)
    assert axes(strategy="group", group_size=64) == ((256, 9), 0, 1)
    assert axes(strategy="block") == ((2, 5), 0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": FP8Scheme.build({"strategy": "tensor"}, "test")},
        {"scheme": FP8Scheme.build({"element": "float8_e5m2"}, "test")},
        {"scales": torch.ones(8, 2)},
        {"zeros": torch.zeros(8, 1, dtype=torch.uint8)},
    ],
)
def test_encode_refuses_a_weight_of_another_contract(change):
    """What it would write means something else."""
    layer = stored_layer(8, 16)
    weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
    writer = change.get("scheme", layer.scheme)
    weight = Weight(weight.codes, change.get("scales", weight.scales), weight.spec, change.get("zeros"))
    with pytest.raises(ConvertError, match="cannot store") as caught:
        writer.encode(weight)
    assert caught.value.code == "QP-CONV-SPEC"


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0)])
def test_layers_without_rows_or_inputs(strategy, n, k):
    """They hold nothing, and hold it through every step."""
    layer = stored_layer(n, k, strategy=strategy)
    weight = layer.scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.dequantize().shape == (n, k)
    assert layer.scheme.quantize(torch.zeros(n, k)).scales.shape == weight.scales.shape


def test_the_plugin_imports_without_torch():
    """Planning happens on machines that have none."""
    modules = "quantplug_fp8.plugin, quantplug_fp8.scheme, quantplug_fp8.dialect, quantplug_fp8.fbgemm"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
