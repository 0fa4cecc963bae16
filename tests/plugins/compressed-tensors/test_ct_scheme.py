"""
Packed layers: what they mean, against the oracle, and the same bytes on the way back.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ct_files import build, stored_layer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantplug.errors import ConvertError
from quantplug.spec import ElementType, LinearShape, PerChannel, PerGroup, PerTensor
from quantplug.weight import ActivationParams
from quantplug_compressed_tensors.layout import pack, unpack
from quantplug_testkit.oracles import compressed_tensors as oracle

BITS = (2, 3, 4, 8)
SHARED = (
    {"strategy": "tensor"}, {"strategy": "channel"}, {"group_size": 16}, {"group_size": 50}, {"group_size": 7},
    {"group_size": 16, "actorder": "group"}, {"group_size": 50, "actorder": "group"},
    {"group_size": 16, "actorder": "weight"},
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    shared=st.sampled_from(SHARED),
    symmetric=st.booleans(),
    n=st.integers(1, 40),
    k=st.integers(1, 130),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
)
@example(bits=3, shared={"group_size": 50}, symmetric=False, n=11, k=75, seed=0, dtype=torch.bfloat16)
def test_values_are_those_of_the_oracle_and_bytes_come_back(bits, shared, symmetric, n, k, seed, dtype):
    """Every width, every way of sharing scales, groups that do not divide, any order of groups."""
    scheme = build(bits=bits, symmetric=symmetric, **shared)
    layer = stored_layer(scheme, n, k, seed, dtype)
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert np.array_equal(weight.dequantize().double().numpy(), layer.values().astype(np.float32))
    stored = scheme.encode(weight)
    assert stored.keys() == layer.tensors.keys()
    for suffix, tensor in layer.tensors.items():
        assert stored[suffix].dtype == tensor.dtype
        assert torch.equal(stored[suffix], tensor), suffix


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS), rows=st.integers(1, 5), count=st.integers(1, 100), seed=st.integers(0, 1000),
    subtract=st.integers(0, 255),
)  # fmt: skip
def test_packing_and_unpacking_are_inverse(bits, rows, count, seed, subtract):
    """Words are the oracle's; codes come back, less what is to be taken from them, and unused fields are 0 before."""
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8))
    words = pack(codes, bits)
    assert np.array_equal(
        words.numpy(), oracle.pack_rows(codes.numpy().astype(int) - (1 << (bits - 1)), bits).reshape(words.shape)
    )
    fields = unpack(words, bits, subtract=subtract)
    assert torch.equal(fields[:, :count], codes - subtract)
    assert not bool((fields[:, count:] + subtract).any())


def test_every_pair_of_code_and_zero_point():
    """All of 2, 3 and 4 bits, and of 8: (code - zero) times a power of two is exact."""
    for bits in BITS:
        top = 1 << bits
        scheme = build(bits=bits, symmetric=False)
        codes = torch.arange(top, dtype=torch.uint8).repeat(top, 1)
        zeros = torch.arange(top, dtype=torch.uint8).unsqueeze(1)
        tensors = {
            "weight_packed": pack(codes, bits),
            "weight_zero_point": pack(zeros.t(), bits).t().contiguous(),
            "weight_scale": torch.full((top, 1), 0.5),
            "weight_shape": torch.tensor([top, top]),
        }
        values = scheme.decode(tensors, LinearShape(top, top), "layer").dequantize()
        index = torch.arange(top, dtype=torch.float32)
        assert torch.equal(values, (index.unsqueeze(0) - index.unsqueeze(1)) * 0.5)


def test_the_contract_says_what_the_parameters_say():
    """Element types, granularity, order; an order of weights stores nothing."""
    spec = build(bits=3, group_size=64, symmetric=False, actorder="group").weight_spec()
    assert (spec.element, spec.granularity, spec.act_order) == (ElementType.UINT3, PerGroup(64), True)
    spec = build(bits=8, actorder="weight").weight_spec()
    assert (spec.element, spec.granularity, spec.act_order) == (ElementType.INT8, PerChannel(), False)
    assert build(bits=4, strategy="tensor").weight_spec().granularity == PerTensor()
    assert build(bits=4, group_size=-1) == build(bits=4)
    assert build(bits=4, group_size=32, activation="int8/token/dynamic").describe() == (
        "ct-pack int4 group 32 sym, x int8 per token, dynamic"
    )


@pytest.mark.parametrize(
    ("params", "stored", "shape"),
    [
        ({"bits": 4}, {"weight_packed": (8, 3), "weight_scale": (8, 1)}, LinearShape(8, 24)),
        ({"bits": 3}, {"weight_packed": (8, 3), "weight_scale": (8,)}, LinearShape(8, 32)),
        ({"bits": 4, "group_size": 128}, {"weight_packed": (8, 24), "weight_scale": (8, 2)}, LinearShape(8, 192)),
        ({"bits": 4, "group_size": 10}, {"weight_packed": (8, 4), "weight_scale": (8, 3)}, LinearShape(8, 30)),
        (
            {"bits": 4, "group_size": 10, "actorder": "group"},
            {"weight_packed": (8, 4), "weight_scale": (8, 3), "weight_g_idx": (29,)},
            LinearShape(8, 29),
        ),
        ({"bits": 4, "strategy": "tensor"}, {"weight_packed": (8, 3), "weight_scale": ()}, LinearShape(8, 24)),
    ],
)
def test_the_size_follows_from_shapes_as_far_as_it_can(params, stored, shape):
    """Full words, full groups, or the length of `weight_g_idx`; scales in the shapes that writers use."""
    assert build(**params).shape_of({**stored, "weight_shape": (2,)}, "layer") == shape


@pytest.mark.parametrize("element", ["int8", "uint8"])
def test_stored_scales_of_x_are_handed_over_and_come_back(element):
    """A static activation: `input_scale`, and `input_zero_point` raised by half the range."""
    scheme = build(bits=4, group_size=16, activation=f"{element}/tensor/static")
    layer = stored_layer(scheme, 8, 32)
    known = scheme.decode_activation(layer.tensors, "layer")
    assert float(known.scale) == 0.0625
    assert (None if known.zero is None else int(known.zero)) == (125 if element == "uint8" else None)
    stored = scheme.encode(scheme.decode(layer.tensors, layer.shape, "layer"), known)
    assert stored.keys() == layer.tensors.keys()
    assert all(torch.equal(tensor, layer.tensors[suffix]) for suffix, tensor in stored.items())
    with pytest.raises(ConvertError, match=r"what is not known about x.*its scale") as caught:
        scheme.encode(scheme.decode(layer.tensors, layer.shape, "layer"))
    assert caught.value.code == "QP-CONV-SPEC"


def test_a_scale_of_x_that_bfloat16_cannot_hold_stays_float32():
    """No bit is lost on the way into a file."""
    scheme = build(bits=4, activation="int8/tensor/static")
    layer = stored_layer(scheme, 8, 32)
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    stored = scheme.encode(weight, ActivationParams(torch.tensor(0.1)))
    assert stored["input_scale"].dtype == torch.float32
    assert float(stored["input_scale"]) == float(torch.tensor(0.1))


def test_without_static_activations_nothing_is_known_about_x():
    """Weight-only and dynamic layers store nothing of the kind."""
    for activation in ("none", "float8_e4m3fn/token/dynamic"):
        scheme = build(bits=4, activation=activation)
        assert scheme.decode_activation(stored_layer(scheme, 8, 32).tensors, "layer") is None
