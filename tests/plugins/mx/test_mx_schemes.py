"""
Decoding and encoding: bit-exact against the oracle and ml_dtypes, for every code, every scale and any size.
"""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_files import MX_ACTIVATION, NV_ACTIVATION, SCHEMES, as_float32, build, same_bits, stored_layer

from quantplug.errors import ConfigError, ConvertError
from quantplug.spec import ActivationSpec, ElementType, LinearShape, PerGroup, WeightSpec
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.oracles import mx as oracle

SPELLINGS = [
    ("mxfp8", {}),
    ("mxfp8", {"scale_name": "weight_scale_inv"}),
    ("mxfp8", {"scale_name": "either"}),
    ("mxfp4", {}),
    ("mxfp4", {"weight_name": "weight", "scale_name": "weight_scale_inv"}),
    ("nvfp4", {}),
    ("nvfp4", {"weight_name": "weight", "global_name": "weight_scale_2", "input_global_name": "input_scale"}),
]


@settings(max_examples=150, deadline=None)
@given(
    spelling=st.sampled_from(SPELLINGS),
    n=st.integers(1, 12),
    pairs=st.integers(1, 70),
    odd=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    factor=st.floats(2.0**-40, 2.0**40, width=32),
)
def test_decode_gives_the_oracles_values_and_encode_the_same_bytes(spelling, n, pairs, odd, seed, factor):
    """Any spelling and size, ragged last groups among them: the values are the oracle's, and no bit changes."""
    scheme = build(spelling[0], **spelling[1])
    k = 2 * pairs + (odd and scheme.codes_per_byte == 1)
    layer = stored_layer(scheme, n, k, seed, stored_global=factor)
    sizes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()}
    assert scheme.shape_of(sizes, "layer") == layer.shape
    declared = {spec.suffix: spec for spec in scheme.params(layer.shape)}
    assert all(declared[suffix].shape == size for suffix, size in sizes.items())
    assert scheme.required_suffixes <= sizes.keys()

    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    weight = layer.decode()
    assert weight.spec == scheme.weight_spec()
    assert np.array_equal(weight.dequantize().numpy(), as_float32(layer.values))
    encoded = scheme.encode(weight)
    assert encoded.keys() == before.keys()
    for name, tensor in encoded.items():
        assert same_bits(tensor, before[name]), name
        assert same_bits(layer.tensors[name], before[name]), f"{name} was modified"


def test_every_mxfp8_code_under_every_scale():
    """254 codes that are numbers, 255 scales: exact down to subnormal values, infinite where float32 ends."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    grid = np.zeros((255, 256), np.uint8)
    grid[:, :254] = codes
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 8, axis=1)
    tensors = {
        "weight": torch.from_numpy(grid).view(torch.float8_e4m3fn),
        "weight_scale": torch.from_numpy(scales),
    }
    values = build("mxfp8").decode(tensors, LinearShape(255, 256), "layer").dequantize().numpy()
    assert np.array_equal(values, as_float32(oracle.mxfp8(grid, scales)))
    witness = grid.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    witness = witness * np.repeat(scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 32, axis=1)
    assert np.array_equal(values, as_float32(witness))
    assert np.isinf(values).any()


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_the_scale_byte_0_is_2_to_the_minus_127_and_not_0(name):
    """A number that float32 only has as a subnormal; reading the byte as an exponent field gives 0 instead."""
    scheme = build(name)
    tensors = {"weight_scale": torch.zeros(1, 1, dtype=torch.uint8)}
    if name == "mxfp8":
        tensors["weight"] = torch.ones(1, 2).to(torch.float8_e4m3fn)
    else:
        tensors["weight_packed"] = torch.tensor([[0x22]], dtype=torch.uint8)
    weight = scheme.decode(tensors, LinearShape(1, 2), "layer")
    assert weight.scale_values().tolist() == [[2.0**-127]]
    assert weight.dequantize().tolist() == [[2.0**-127, 2.0**-127]]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_every_byte_of_two_codes(name):
    """16 codes in the low nibble times 16 in the high one: the first code is the low one, and -0 stays -0."""
    scheme = build(name)
    packed = np.arange(256, dtype=np.uint8)[:, None]
    tensors = {"weight_packed": torch.from_numpy(packed.copy())}
    if name == "mxfp4":
        tensors["weight_scale"] = torch.full((256, 1), 127, dtype=torch.uint8)
    else:
        tensors["weight_scale"] = torch.ones(256, 1).to(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = torch.ones(1)
    weight = scheme.decode(tensors, LinearShape(256, 2), "layer")
    halves = np.concatenate([packed & 15, packed >> 4], axis=1)
    assert np.array_equal(weight.codes.numpy(), halves)
    values = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert same_bits(weight.dequantize(), torch.from_numpy(values))
    assert same_bits(scheme.encode(weight)["weight_packed"], tensors["weight_packed"])


def test_every_nvfp4_scale():
    """All 127 e4m3 numbers without a sign; 0 only over codes of 0."""
    octets = np.arange(127, dtype=np.uint8)[:, None]
    packed = np.full((127, 8), 0x71, np.uint8)
    packed[0] = 0x80  # 0 and -0
    tensors = {
        "weight_packed": torch.from_numpy(packed),
        "weight_scale": torch.from_numpy(octets).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
    }
    scheme = build("nvfp4", global_name="weight_scale_2")
    values = scheme.decode(tensors, LinearShape(127, 16), "layer").dequantize().numpy()
    assert np.array_equal(values[1:, 1], octets[1:, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * 1.5)
    assert not values[0].any()


def test_what_already_is_canonical_is_not_copied():
    """MXFP8 codes and all scales are the stored tensors themselves, seen as another dtype."""
    for name in SCHEMES:
        layer = stored_layer(build(name), 4, 64)
        weight = layer.decode()
        assert weight.scales.data_ptr() == layer.tensors["weight_scale"].data_ptr()
        if name == "mxfp8":
            assert weight.codes.data_ptr() == layer.tensors["weight"].data_ptr()


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_scales_stored_as_powers_of_two_are_the_same_bytes(name):
    """float8_e8m0fnu says what the bytes are; they are written as uint8, which every reader takes."""
    layer = stored_layer(build(name), 4, 96)
    plain = layer.decode()
    octets = layer.tensors["weight_scale"]
    layer.tensors["weight_scale"] = octets.view(torch.float8_e8m0fnu)
    assert torch.equal(layer.decode().dequantize(), plain.dequantize())
    assert same_bits(layer.scheme.encode(layer.decode())["weight_scale"], octets)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_either_name_of_the_scales_is_read_and_one_is_written(name):
    """A scheme that takes either name writes `weight_scale_inv`, which readers of such configurations look for."""
    either = build(name, scale_name="either")
    layer = stored_layer(either, 4, 64)
    plain = layer.decode().dequantize()
    layer.tensors["weight_scale"] = layer.tensors.pop("weight_scale_inv")
    assert either.shape_of({s: tuple(t.shape) for s, t in layer.tensors.items()}, "layer") == layer.shape
    assert torch.equal(layer.decode().dequantize(), plain)
    encoded = either.encode(layer.decode())
    assert same_bits(encoded["weight_scale_inv"], layer.tensors["weight_scale"])
    assert {spec.suffix for spec in either.written(layer.shape)} == encoded.keys()


def test_layers_without_inputs_or_outputs_are_layers():
    """No rows, or no inputs: nothing to check, nothing to fail."""
    for name in SCHEMES:
        for n, k in ((0, 64), (4, 0)):
            layer = stored_layer(build(name), n, k)
            assert layer.decode().dequantize().shape == (n, k)


@pytest.mark.parametrize(
    ("name", "params", "words", "contract", "activation"),
    [
        (
            "mxfp8", {"activation": MX_ACTIVATION}, "mxfp8, x float8_e4m3fn group 32, dynamic",
            WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu"),
            ActivationSpec(ElementType.FLOAT8_E4M3FN, "group", True, 32, "float8_e8m0fnu"),
        ),
        (
            "mxfp4", {"activation": "none"}, "mxfp4",
            WeightSpec(ElementType.FLOAT4_E2M1FN, PerGroup(32), "float8_e8m0fnu"), None,
        ),
        (
            "nvfp4", {"activation": NV_ACTIVATION}, "nvfp4, x float4_e2m1fn group 16, dynamic",
            WeightSpec(ElementType.FLOAT4_E2M1FN, PerGroup(16), "float8_e4m3fn", global_scale=True),
            ActivationSpec(ElementType.FLOAT4_E2M1FN, "group", True, 16, "float8_e4m3fn", global_scale=True),
        ),
    ],
)  # fmt: skip
def test_the_contract_and_its_words(name, params, words, contract, activation):
    """What a plan shows, and what kernels are asked about."""
    scheme = build(name, **params)
    assert (scheme.describe(), scheme.weight_spec(), scheme.activation_spec()) == (words, contract, activation)


def test_params_declare_axes_for_splitting():
    """Rows and inputs split everywhere but in single numbers; codes of four bits share bytes along K."""
    for name in SCHEMES:
        specs = {spec.suffix: spec for spec in build(name).params(LinearShape(64, 96))}
        whole = [spec for suffix, spec in specs.items() if suffix != "weight_global_scale"]
        assert {(spec.output_axis, spec.input_axis) for spec in whole} == {(0, 1)}
    packed = build("nvfp4").params(LinearShape(64, 96))[0]
    assert (packed.shape, packed.packed_axis, packed.packed_factor) == ((64, 48), 1, (2, 1))
    assert specs["weight_global_scale"].other_shapes == ((),)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_an_odd_number_of_inputs_is_refused_where_codes_share_bytes(name):
    """The plan of a dense file then says which layer to leave whole."""
    with pytest.raises(ConfigError, match="in_features: is 575; expected a multiple of 2") as caught:
        build(name).params(LinearShape(4, 575))
    assert caught.value.code == "QP-CFG-FIELD"
    assert build("mxfp8").params(LinearShape(4, 575))[1].shape == (4, 18)


@pytest.mark.parametrize(
    ("name", "params", "code", "words"),
    [
        ("mxfp8", {"group_size": 32}, "QP-CFG-UNKNOWN", "group_size: is no parameter of mxfp8"),
        ("mxfp8", {"weight_name": "weight"}, "QP-CFG-UNKNOWN", "weight_name"),
        ("mxfp8", {"scale_name": "scales"}, "QP-CFG-FIELD", "'weight_scale', 'weight_scale_inv', 'either'"),
        ("mxfp4", {"weight_name": "weight_blocks"}, "QP-CFG-FIELD", "'weight_packed', 'weight'"),
        ("nvfp4", {"scale_name": "either"}, "QP-CFG-FIELD", "'weight_scale', 'weight_scale_inv'"),
        ("nvfp4", {"global_name": True}, "QP-CFG-FIELD", "is true"),
        ("nvfp4", {"input_global_name": "x"}, "QP-CFG-FIELD", "input_global_scale"),
        ("mxfp8", {"activation": "int8/token/dynamic"}, "QP-CFG-FIELD", "quantizes x to int8; expected a floating"),
        ("mxfp8", {"activation": NV_ACTIVATION}, "QP-CFG-FIELD", "has a global scale of x; expected none"),
        ("nvfp4", {"activation": "float8_e4m3fn/token/static"}, "QP-CFG-FIELD", "stores scales per token"),
        ("mxfp4", {"activation": "dynamic"}, "QP-CFG-FIELD", "the string 'dynamic'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, params, code, words):
    """By name, with what is possible."""
    with pytest.raises(ConfigError, match=words) as caught:
        SCHEMES[name].build(params, "test")
    assert caught.value.code == code


@pytest.mark.parametrize("name", SCHEMES)
def test_a_static_scale_of_x_comes_along(name):
    """One number for all of x, read and written."""
    scheme = build(name, activation="float8_e4m3fn/tensor/static")
    layer = stored_layer(scheme, 4, 64)
    layer.tensors["input_scale"] = torch.tensor(0.75)
    assert "input_scale" in scheme.required_suffixes
    activation = scheme.decode_activation(layer.tensors, "layer")
    assert activation.scale.item() == 0.75
    assert same_bits(scheme.encode(layer.decode(), activation)["input_scale"], layer.tensors["input_scale"])
    with pytest.raises(ConvertError, match="unknown scale of x") as caught:
        scheme.encode(layer.decode())
    assert caught.value.code == "QP-CONV-SPEC"


@pytest.mark.parametrize("name", SCHEMES)
def test_weight_only_and_dynamic_formats_know_nothing_about_x(name):
    """So nothing is handed to kernels, and nothing is asked of a writer."""
    for activation in ("none", "float8_e4m3fn/token/dynamic"):
        scheme = build(name, activation=activation)
        layer = stored_layer(scheme, 4, 64)
        assert scheme.decode_activation(layer.tensors, "layer") is None
        assert scheme.encode(layer.decode(), ActivationParams()).keys() == layer.tensors.keys()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mxfp8", lambda w: stored_layer(build("mxfp4"), 4, 64).decode(), "a weight of float4_e2m1fn group 32"),
        ("mxfp4", lambda w: Weight(w.codes, w.scales[:, :1], w.spec), r"scales \[4, 1\]; expected \[4, 2\]"),
        ("mxfp4", lambda w: Weight(w.codes[:, :63], w.scales, w.spec), "63 inputs"),
        ("mxfp4", lambda w: Weight(w.codes | 16, w.scales, w.spec), "the code (1[6-9]|2[0-9]|3[01]); expected 4 bits"),
        ("mxfp8", lambda w: Weight(w.codes.view(torch.uint8), w.scales, w.spec), "codes in torch.uint8"),
        ("mxfp8", lambda w: Weight(w.codes, w.scales.view(torch.uint8), w.spec), "scales in torch.uint8"),
        ("nvfp4", lambda w: Weight(w.codes, w.scales, w.spec), "expected a global scale"),
        ("mxfp8", lambda w: Weight(w.codes, w.scales, w.spec, global_scale=torch.ones(())), "expected no others"),
    ],
)
def test_encode_refuses_a_weight_of_another_contract(name, change, words):
    """Codes that do not fit would run into their neighbours; scales of another dtype would be read as others."""
    layer = stored_layer(build(name), 4, 64)
    with pytest.raises(ConvertError, match=words) as caught:
        layer.scheme.encode(change(layer.decode()))
    assert caught.value.code == "QP-CONV-SPEC"


def test_encode_takes_any_strides():
    """A kernel that hands back transposed memory writes the same bytes."""
    for name in SCHEMES:
        layer = stored_layer(build(name), 6, 64)
        weight = layer.decode()
        turned = Weight(
            weight.codes.t().contiguous().t(), weight.scales.t().contiguous().t(), weight.spec,
            global_scale=weight.global_scale,
        )  # fmt: skip
        encoded = layer.scheme.encode(turned)
        assert all(same_bits(encoded[suffix], tensor) for suffix, tensor in layer.tensors.items())


def test_the_plugin_imports_without_torch():
    """Planning happens on machines that have none."""
    modules = "quantplug_mx.plugin, quantplug_mx.dialect, quantplug_mx.nvfp4, quantplug_mx.scheme"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
