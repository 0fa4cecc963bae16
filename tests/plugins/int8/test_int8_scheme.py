"""
Decoding and encoding: bit-exact against the oracle, for every parameter and size; and what is stored about x.
"""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_files import Layer, build, stored_layer

from quantplug.errors import ConvertError
from quantplug.spec import ElementType, LinearShape, PerBlock, PerChannel, PerGroup, PerTensor
from quantplug.weight import ActivationParams, Weight
from quantplug_int8.scheme import Int8Scheme
from quantplug_testkit.oracles import int8 as oracle

granularities = st.one_of(
    st.builds(PerTensor),
    st.builds(PerChannel),
    st.builds(PerGroup, st.integers(1, 70)),
    st.builds(PerBlock, st.integers(1, 9), st.integers(1, 40)),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_the_worked_example_of_the_oracle_holds():
    result = doctest.testmod(oracle)
    assert result.attempted
    assert result.failed == 0


@settings(max_examples=200, deadline=None)
@given(
    bits=st.sampled_from((8, 4)),
    granularity=granularities,
    symmetric=st.booleans(),
    scale_name=st.sampled_from(("weight_scale", "weight_scale_inv")),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 20),
    k=st.integers(1, 90),
    seed=st.integers(0, 2**32 - 1),
)
def test_decode_gives_the_oracles_values_and_encode_the_same_bytes(
    bits, granularity, symmetric, scale_name, dtype, n, k, seed
):
    """Any strategy, size and dtype of scales: the values are the oracle's, and the way back changes no bit."""
    symmetric = symmetric or isinstance(granularity, PerBlock)
    scheme = Int8Scheme(bits, granularity, symmetric, scale_name)
    layer = stored_layer(scheme, n, k, seed, dtype)
    sizes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()}
    assert scheme.shape_of(sizes, "layer") == layer.shape
    assert sizes == {spec.suffix: spec.shape for spec in scheme.params(layer.shape)}
    assert scheme.required_suffixes == sizes.keys()

    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.spec == replace(scheme.weight_spec(), scale_dtype=str(dtype).removeprefix("torch."))
    # A product of a float32 scale and nine bits is rounded once, from float64, by the comparison.
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), layer.values().astype(np.float32))
    stored = scheme.encode(weight)
    assert stored.keys() == before.keys()
    for name, tensor in stored.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(layer.tensors[name], before[name]), f"{name} was modified"


@pytest.mark.parametrize("bits", [8, 4])
def test_every_pair_of_code_and_zero_point(bits):
    """All (code, zero point) pairs of a width: the difference is exact, and each comes back as it was."""
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half).to(torch.int8)
    scheme = build(bits=bits, symmetric=False)
    tensors = {
        "weight": codes.expand(2 * half, -1).contiguous(),
        "weight_scale": torch.ones(2 * half, 1, dtype=torch.bfloat16),
        "weight_zero_point": codes.view(-1, 1).contiguous(),
    }
    weight = scheme.decode(tensors, LinearShape(2 * half, 2 * half), "layer")
    assert weight.codes.dtype == weight.zeros.dtype == torch.uint8
    assert weight.codes[0].tolist() == list(range(2 * half))
    assert torch.equal(weight.dequantize().int(), codes.int()[None, :] - codes.int()[:, None])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in scheme.encode(weight).items())


@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_of_a_symmetric_file_is_shared_not_copied(bits):
    half = 1 << (bits - 1)
    tensors = {
        "weight": torch.arange(-half, half).to(torch.int8).view(1, -1),
        "weight_scale": torch.tensor([[-0.5]], dtype=torch.float16),
    }
    weight = build(bits=bits).decode(tensors, LinearShape(1, 2 * half), "layer")
    assert weight.zeros is None
    assert weight.codes.data_ptr() == tensors["weight"].data_ptr()
    assert weight.dequantize()[0].tolist() == [code * -0.5 for code in range(-half, half)]


@pytest.mark.parametrize(
    ("params", "shapes"),
    [
        ({"strategy": "tensor"}, [(), (1,), (1, 1)]),
        ({"strategy": "channel"}, [(6,), (6, 1)]),
        ({"strategy": "tensor", "symmetric": False}, [(), (1,), (1, 1)]),
    ],
)
def test_scales_in_every_shape_that_writers_use_mean_the_same(params, shapes):
    """A single number, or one per row, with or without an axis of 1; the first declared shape is what is written."""
    scheme = build(**params)
    layer = stored_layer(scheme, 6, 8)
    for shape in shapes:
        tensors = {
            name: tensor if name == "weight" else tensor.reshape(shape) for name, tensor in layer.tensors.items()
        }
        sizes = {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
        assert scheme.shape_of(sizes, "layer") == layer.shape
        weight = scheme.decode(tensors, layer.shape, "layer")
        assert np.array_equal(weight.dequantize().numpy(), layer.values().astype(np.float32))
        assert all(torch.equal(tensor, layer.tensors[name]) for name, tensor in scheme.encode(weight).items())


STATIC = {
    "int8/tensor/static": (None, None),
    "float8_e4m3fn/tensor/static": (None, None),
    "uint8/tensor/static": (torch.int8, -28),
    "uint4/tensor/static": (torch.int8, -3),
}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("activation", STATIC)
def test_stored_activation_scales_come_out_and_go_back(activation, shape):
    """The scale as float32, the zero point unsigned; and back, byte for byte, in the shape `[1]`."""
    scheme = build(activation=activation)
    layer = stored_layer(scheme, 4, 8)
    dtype, zero = STATIC[activation]
    layer.tensors["input_scale"] = torch.full(shape, 0.0723, dtype=torch.bfloat16)
    if dtype is not None:
        layer.tensors["input_zero_point"] = torch.full(shape, zero, dtype=dtype)
    found = scheme.decode_activation(layer.tensors, "layer")
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == ()
    assert found.scale == layer.tensors["input_scale"].float().reshape(())
    if dtype is None:
        assert found.zero is None
    else:
        assert found.zero.dtype == torch.uint8
        assert found.zero.shape == ()
        assert int(found.zero) == zero + (1 << (scheme.activation.element.bits - 1))
    stored = scheme.encode(scheme.decode(layer.tensors, layer.shape, "layer"), found)
    assert stored.keys() == layer.tensors.keys()
    for name in stored:
        assert stored[name].dtype == layer.tensors[name].dtype
        assert torch.equal(stored[name].reshape(layer.tensors[name].shape), layer.tensors[name])


def test_every_zero_point_of_x_is_raised_by_half_the_range():
    """In both spellings, all 256 of them; and the codes of x are raised with them, so that values stay."""
    scheme = build(activation="uint8/tensor/static")
    scale = torch.tensor([0.5])
    for zero in range(-128, 128):
        signed = {"input_scale": scale, "input_zero_point": torch.tensor([zero], dtype=torch.int8)}
        unsigned = {"input_scale": scale, "input_zero_point": torch.tensor([zero + 128], dtype=torch.uint8)}
        points = [int(scheme.decode_activation(tensors, "layer").zero) for tensors in (signed, unsigned)]
        assert points == [zero + 128] * 2
        (code,) = oracle.quantize_input([1.5], 0.5, zero)
        assert code == 255 or (code - points[0]) * 0.5 == 1.5


def test_a_scale_of_x_that_the_weights_dtype_does_not_hold_is_written_as_float32():
    scheme = build(activation="int8/tensor/static")
    layer = stored_layer(scheme, 4, 8)
    layer.tensors["input_scale"] = torch.tensor([0.1])
    stored = scheme.encode(
        scheme.decode(layer.tensors, layer.shape, "layer"), scheme.decode_activation(layer.tensors, "layer")
    )
    assert torch.equal(stored["input_scale"], torch.tensor([0.1]))
    assert stored["input_scale"].dtype == torch.float32


@pytest.mark.parametrize("activation", ["none", "int8/token/dynamic", "int8/group128/dynamic", "uint8/token/dynamic"])
def test_dynamic_activations_store_nothing(activation):
    scheme = build(activation=activation)
    assert scheme.decode_activation(stored_layer(scheme, 4, 8).tensors, "layer") is None
    assert scheme.required_suffixes == {"weight", "weight_scale"}
    assert scheme.activation_spec() == scheme.activation


def test_what_a_scheme_calls_itself():
    assert build().describe() == "int8 per channel sym"
    assert build(activation="int8/token/dynamic").describe() == "int8 per channel sym, x int8 per token, dynamic"
    assert build(bits=4, strategy="group", group_size=64, symmetric=False).describe() == "int4 group 64 asym"
    assert build(strategy="block", block_k=64).describe() == "int8 block 128x64 sym"
    assert build(symmetric=False).weight_spec().element is ElementType.UINT8


def broken(layer: Layer, **changes: object) -> Weight:
    return replace(layer.scheme.decode(layer.tensors, layer.shape, "layer"), **changes)


SYM, ASYM = build(bits=4), build(bits=4, symmetric=False)
NOT_STORABLE = {
    "another contract": (build(), broken(stored_layer(SYM, 4, 8)), "a weight of int4 per channel"),
    "scales of a group": (SYM, broken(stored_layer(SYM, 4, 8), scales=torch.ones(4, 2)), r"scales \[4, 2\]"),
    "zero points of a row too few": (
        ASYM, broken(stored_layer(ASYM, 4, 8), zeros=torch.zeros(3, 1, dtype=torch.uint8)), r"zero points \[3, 1\]",
    ),
    "a code too large": (
        SYM, broken(stored_layer(SYM, 4, 8), codes=torch.full((4, 8), 8, dtype=torch.int8)), "the code 8; .*-8 to 7",
    ),
    "a code too small": (
        SYM, broken(stored_layer(SYM, 4, 8), codes=torch.full((4, 8), -9, dtype=torch.int8)), "the code -9; ",
    ),
    "a zero point too large": (
        ASYM, broken(stored_layer(ASYM, 4, 8), zeros=torch.full((4, 1), 16, dtype=torch.uint8)), "the zero point 16; ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_STORABLE)
def test_what_cannot_be_stored_is_refused(name):
    scheme, weight, text = NOT_STORABLE[name]
    with pytest.raises(ConvertError, match=text) as caught:
        scheme.encode(weight)
    assert caught.value.code == "QP-CONV-SPEC"


@pytest.mark.parametrize(
    ("activation", "given"),
    [
        ("int8/tensor/static", None),
        ("int8/tensor/static", ActivationParams()),
        ("uint8/tensor/static", ActivationParams(torch.tensor(1.0))),
        ("int8/tensor/static", ActivationParams(torch.tensor(1.0), torch.tensor(3, dtype=torch.uint8))),
    ],
)
def test_a_static_activation_is_not_written_without_its_numbers(activation, given):
    scheme = build(activation=activation)
    layer = stored_layer(scheme, 4, 8)
    with pytest.raises(ConvertError, match="not known about x") as caught:
        scheme.encode(scheme.decode(layer.tensors, layer.shape, "layer"), given)
    assert caught.value.code == "QP-CONV-SPEC"


def test_the_plugin_imports_without_torch():
    code = (
        "import sys, quantplug_int8.plugin as p; p.quantplug_schemes(); p.quantplug_dialects(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
