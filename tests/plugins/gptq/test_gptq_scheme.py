"""
Decoding and encoding: bit-exact against the oracle, for every parameter, size and order.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from gptq_files import stored_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import ConvertError
from quantplug.spec import ElementType, LinearShape, PerChannel, PerGroup
from quantplug.weight import Weight
from quantplug_gptq.scheme import GPTQScheme
from quantplug_testkit.oracles import gptq as oracle

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")

schemes = st.builds(
    GPTQScheme,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((-1, 1, 7, 16, 32, 64, 128)),
    sym=st.booleans(),
    desc_act=st.booleans(),
    checkpoint_format=st.sampled_from(FORMATS),
)


@settings(max_examples=200, deadline=None)
@given(scheme=schemes, n=st.integers(1, 40), k=st.integers(1, 150), seed=st.integers(0, 2**32 - 1))
def test_decode_gives_the_oracles_values_and_encode_the_same_bytes(scheme, n, k, seed):
    """Any width, group, size and permutation: the values are the oracle's, and the way back changes no bit."""
    layer = stored_layer(scheme, n, k, seed)
    sizes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()}
    assert scheme.shape_of(sizes, "layer") == layer.shape
    assert sizes == {spec.suffix: spec.shape for spec in scheme.params(layer.shape)}

    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.spec == scheme.weight_spec()
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), layer.values().astype(np.float32))
    for name, tensor in scheme.encode(weight).items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(layer.tensors[name], before[name]), f"{name} was modified"


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("bits", BITS)
def test_every_pair_of_code_and_zero_point(bits, checkpoint_format):
    """All (code, zero point) pairs of a width, the zero point that version 1 wraps included."""
    count = 1 << bits
    scheme = GPTQScheme(bits, count, sym=False, checkpoint_format=checkpoint_format)
    codes = np.tile(np.arange(count, dtype=np.uint8)[:, None], (1, count))
    zeros = np.arange(count)[None, :]
    stored = zeros if checkpoint_format == "gptq_v2" else (zeros - 1) % count
    tensors = {
        "qweight": torch.from_numpy(oracle.pack_rows(codes, bits)),
        "qzeros": torch.from_numpy(oracle.pack_columns(stored.astype(np.uint8), bits).copy()),
        "scales": torch.ones(1, count, dtype=torch.float16),
        "g_idx": torch.zeros(count, dtype=torch.int32),
    }
    weight = scheme.decode(tensors, LinearShape(count, count), "layer")
    assert np.array_equal(weight.dequantize().numpy(), codes.T.astype(int) - zeros.T)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in scheme.encode(weight).items())


@pytest.mark.parametrize("bits", BITS)
def test_every_code_of_a_symmetric_file(bits):
    """A symmetric layer has signed codes and no zero points; every code point is checked."""
    count = 1 << bits
    codes = np.arange(count, dtype=np.uint8)[:, None].repeat(32, 1)
    tensors = {
        "qweight": torch.from_numpy(oracle.pack_rows(codes, bits)),
        "qzeros": torch.from_numpy(oracle.pack_columns(np.full((1, 32), count // 2 - 1, np.uint8), bits).copy()),
        "scales": torch.full((1, 32), -0.5, dtype=torch.float16),
    }
    scheme = GPTQScheme(bits, -1)
    weight = scheme.decode(tensors, LinearShape(32, count), "layer")
    assert weight.zeros is None
    assert weight.codes.dtype == torch.int8
    assert weight.codes[0].tolist() == list(range(-count // 2, count // 2))
    assert weight.dequantize()[0].tolist() == [(code - count // 2) * -0.5 for code in range(count)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_taken_from_whole_words_come_back_with_their_borrows(bits):
    """GPTQModel subtracts one from every field at once: a zero point of 0 borrows from its neighbour."""
    scheme = GPTQScheme(bits, 16, sym=False, zeros_offset="word")
    layer = stored_layer(scheme, 64, 48, seed=bits)
    layer.zeros[:, ::3] = 0
    packed = oracle.pack_columns(layer.zeros, bits)
    ones = np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])
    layer.tensors["qzeros"] = torch.from_numpy((packed.view(np.uint32) - ones).view(np.int32).copy())
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert np.array_equal(weight.zeros.numpy(), layer.zeros.T)
    assert torch.equal(scheme.encode(weight)["qzeros"], layer.tensors["qzeros"])


def test_both_readings_of_version_one_agree_where_no_zero_point_is_zero():
    """So a file without zero points of 0 means the same to every reader."""
    by_field, by_word = (GPTQScheme(4, 16, sym=False, zeros_offset=offset) for offset in ("field", "word"))
    layer = stored_layer(by_field, 64, 48, smallest_zero=1)
    one, two = (scheme.decode(layer.tensors, layer.shape, "layer") for scheme in (by_field, by_word))
    assert torch.equal(one.zeros, two.zeros)
    assert torch.equal(by_field.encode(one)["qzeros"], by_word.encode(two)["qzeros"])


def test_unused_fields_of_a_ragged_row_as_gptqmodel_leaves_them():
    """60 outputs leave four fields of a word unused; subtracting from the whole word leaves borrows there."""
    scheme = GPTQScheme(4, 32, sym=True, zeros_offset="word")
    layer = stored_layer(scheme, 60, 32)
    packed = oracle.pack_columns(layer.zeros, 4).view(np.uint32) - np.uint32(0x11111111)
    assert hex(packed[0, -1]) == "0xeeef7777"
    layer.tensors["qzeros"] = torch.from_numpy(packed.view(np.int32).copy())
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert torch.equal(scheme.encode(weight)["qzeros"], layer.tensors["qzeros"])


def test_without_g_idx_the_order_is_trivial_and_encode_writes_it_out():
    """auto-round stores no g_idx: the one declared addition of encode."""
    scheme = GPTQScheme(4, 32)
    layer = stored_layer(scheme, 16, 64)
    trivial = layer.tensors.pop("g_idx")
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.g_idx is None
    assert torch.equal(scheme.encode(weight)["g_idx"], trivial)


def test_a_trivial_order_is_dropped_even_when_act_order_is_announced():
    """Kernels then need not permute anything."""
    scheme = GPTQScheme(4, 32, desc_act=True)
    layer = stored_layer(scheme, 16, 64)
    layer.tensors["g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    assert scheme.decode(layer.tensors, layer.shape, "layer").g_idx is None


def test_a_g_idx_that_was_never_filled_in_counts_as_trivial():
    """Zeros throughout, several groups, no desc_act: the declared normalisation of old writers' files."""
    scheme = GPTQScheme(4, 32)
    layer = stored_layer(scheme, 16, 64)
    layer.tensors["g_idx"].zero_()
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.g_idx is None
    assert scheme.encode(weight)["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_scales_keep_the_dtype_they_are_stored_in():
    """BF16 and FP32 scales are neither rounded nor renamed."""
    scheme = GPTQScheme(4, 32)
    layer = stored_layer(scheme, 16, 64)
    for dtype in (torch.bfloat16, torch.float32):
        layer.tensors["scales"] = layer.tensors["scales"].to(dtype)
        weight = scheme.decode(layer.tensors, layer.shape, "layer")
        assert weight.spec.scale_dtype == str(dtype).removeprefix("torch.")
        assert torch.equal(scheme.encode(weight)["scales"], layer.tensors["scales"])


def test_zero_and_negative_scales_are_values_like_others():
    """auto-round writes negative scales; a dead group has scale 0."""
    scheme = GPTQScheme(4, 32)
    layer = stored_layer(scheme, 16, 64)
    layer.tensors["scales"][0] = 0
    layer.tensors["scales"][1] = -0.25
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), layer.values())


@pytest.mark.parametrize(
    ("params", "words", "element", "granularity", "act_order"),
    [
        ({"bits": 4, "group_size": 64}, "gptq 4-bit group 64 sym", ElementType.INT4, PerGroup(64), False),
        (
            {"bits": 3, "group_size": -1, "sym": False},
            "gptq 3-bit per channel asym",
            ElementType.UINT3,
            PerChannel(),
            0,
        ),
        (
            {"bits": 8, "group_size": 32, "desc_act": True, "checkpoint_format": "gptq_v2"},
            "gptq 8-bit group 32 sym act-order v2",
            ElementType.INT8,
            PerGroup(32),
            True,
        ),
        (
            {"bits": 2, "group_size": -1, "desc_act": True},  # one group: nothing to order
            "gptq 2-bit per channel sym",
            ElementType.INT2,
            PerChannel(),
            False,
        ),
    ],
)
def test_the_contract_and_its_words(params, words, element, granularity, act_order):
    """What a plan shows, and what kernels are asked about."""
    scheme = GPTQScheme.build(params, "test")
    spec = scheme.weight_spec()
    assert scheme.describe() == words
    assert (spec.element, spec.granularity, spec.act_order) == (element, granularity, act_order)


def test_three_bits_have_no_word_offset():
    """GPTQModel works field by field there, so the parameter is normalised away and equal schemes stay equal."""
    built = GPTQScheme.build({"bits": 3, "group_size": 32, "zeros_offset": "word"}, "test")
    assert built == GPTQScheme(3, 32)
    v2 = GPTQScheme.build({"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "zeros_offset": "word"}, "test")
    assert v2.zeros_offset == "field"


def test_params_declare_axes_for_splitting():
    """K of a row-parallel and N of a column-parallel layer, and how codes share words along them."""
    specs = {spec.suffix: spec for spec in GPTQScheme(3, 32, desc_act=True).params(LinearShape(64, 96))}
    assert (specs["qweight"].packed_axis, specs["qweight"].packed_factor) == (0, (32, 3))
    assert (specs["qzeros"].packed_axis, specs["qzeros"].packed_factor) == (1, (32, 3))
    assert [spec.suffix for spec in specs.values() if spec.required] == ["qweight", "qzeros", "scales", "g_idx"]
    assert {(spec.output_axis, spec.input_axis) for spec in specs.values() if spec.suffix != "g_idx"} == {(1, 0)}
    assert not GPTQScheme(3, 32).params(LinearShape(64, 96))[3].required


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": GPTQScheme(4, 32, sym=False)},
        {"scheme": GPTQScheme(4, 16)},
        {"scheme": GPTQScheme(8, 32)},
        {"scales": torch.ones(16, 3, dtype=torch.float16)},
        {"codes": torch.full((16, 64), 8, dtype=torch.int8)},
    ],
)
def test_encode_refuses_a_weight_of_another_contract(change):
    """Codes that do not fit would run into their neighbours."""
    scheme = GPTQScheme(4, 32)
    layer = stored_layer(scheme, 16, 64)
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    writer = change.pop("scheme", scheme)
    weight = Weight(
        change.get("codes", weight.codes), change.get("scales", weight.scales), weight.spec, weight.zeros, weight.g_idx
    )
    with pytest.raises(ConvertError, match="cannot store") as caught:
        writer.encode(weight)
    assert caught.value.code == "QP-CONV-SPEC"


def test_the_plugin_imports_without_torch():
    """Planning happens on machines that have none."""
    modules = "quantplug_gptq.plugin, quantplug_gptq.scheme, quantplug_gptq.dialect"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
