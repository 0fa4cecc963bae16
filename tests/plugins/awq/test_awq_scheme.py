"""
Decoding and encoding: bit-exact against the oracle, for every layout, size and symmetry.
"""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from awq_files import build, stored_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import ConfigError, ConvertError
from quantplug.spec import ElementType, LinearShape, PerChannel, PerGroup
from quantplug_awq import layout
from quantplug_awq.fields import gemv_words
from quantplug_awq.scheme import AWQScheme
from quantplug_testkit.oracles import awq as oracle


def test_the_worked_example_of_the_oracle_holds():
    result = doctest.testmod(oracle)
    assert result.attempted
    assert result.failed == 0


@settings(max_examples=80, deadline=None)
@given(
    group_size=st.sampled_from((-1, 16, 32, 64, 128)),
    zero_point=st.booleans(),
    version=st.sampled_from(("gemm", "gemv")),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    eights=st.integers(1, 4),
    groups=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_decode_gives_the_oracles_values_and_encode_the_same_bytes(
    group_size, zero_point, version, dtype, eights, groups, seed
):
    """Any layout, group, size and symmetry: the values are the oracle's, and the way back changes no bit."""
    scheme = AWQScheme(group_size, zero_point, version)
    k = 128 * (1 + groups // 10) if group_size == -1 else group_size * min(groups, 640 // group_size)
    layer = stored_layer(scheme, 8 * eights, k, seed, dtype)
    sizes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.tensors.items()}
    assert scheme.shape_of(sizes, "layer") == layer.shape
    assert sizes == {spec.suffix: spec.shape for spec in scheme.params(layer.shape)}

    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.spec == replace(scheme.weight_spec(), scale_dtype=str(dtype).removeprefix("torch."))
    assert np.array_equal(weight.dequantize(torch.float64).numpy(), layer.values().astype(np.float32))
    for name, tensor in scheme.encode(weight).items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(layer.tensors[name], before[name]), f"{name} was modified"


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_every_pair_of_code_and_zero_point(version):
    """All 256 pairs, each in every field of a word."""
    scheme = build(group_size=128, version=version)
    codes = np.tile(np.arange(128) // 8, (128, 1))  # every code in each of eight neighbours
    zeros = (np.arange(128) // 8)[:, None]
    if version == "gemm":
        arrays = oracle.pack(codes.T, oracle.GEMM_FIELDS), oracle.pack(zeros.T, oracle.GEMM_FIELDS), np.ones((1, 128))
    else:
        beyond = ((0, 0), (0, 7))
        arrays = (
            oracle.pack(codes, oracle.GEMV_FIELDS),
            oracle.pack(np.pad(zeros, beyond), oracle.GEMV_FIELDS),
            np.pad(np.ones((128, 1)), beyond),
        )
    tensors = dict(zip(("qweight", "qzeros", "scales"), map(torch.from_numpy, arrays), strict=True))
    tensors["scales"] = tensors["scales"].half()
    weight = scheme.decode(tensors, LinearShape(128, 128), "layer")
    assert weight.codes.tolist() == codes.tolist()
    assert weight.zeros.tolist() == zeros.tolist()
    assert np.array_equal(weight.dequantize().numpy(), codes - zeros)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in scheme.encode(weight).items())


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_every_code_of_a_symmetric_file_is_signed(version):
    """Zero points of 8 are taken from the codes, which need none then."""
    scheme = build(group_size=-1, zero_point=False, version=version)
    layer = stored_layer(scheme, 16, 128, seed=1)
    weight = scheme.decode(layer.tensors, layer.shape, "layer")
    assert weight.zeros is None
    assert weight.codes.dtype == torch.int8
    assert sorted(set(weight.codes.flatten().tolist())) == list(range(-8, 8))
    asymmetric = build(group_size=-1, version=version).decode(layer.tensors, layer.shape, "layer")
    assert torch.equal(weight.dequantize(), asymmetric.dequantize())


@pytest.mark.parametrize("fields", [layout.GEMM_ORDER, layout.PLAIN_ORDER])
@pytest.mark.parametrize("rows", [0, 1, 3, 400])
@pytest.mark.parametrize("columns", [0, 1, 5, 400])
def test_words_are_taken_apart_as_the_oracle_does_it(rows, columns, fields):
    """In pieces or not, sign bits set or not, views or not."""
    words = torch.randint(-(2**31), 2**31 - 1, (columns, rows), generator=torch.Generator().manual_seed(4)).int().t()
    unpack = layout.unpack_columns if fields == layout.GEMM_ORDER else layout.unpack_rows
    codes = unpack(words)
    assert torch.equal(layout.pack(codes, fields), words)
    assert torch.equal(unpack(words, subtract=8), codes - 8)
    assert codes[:7].tolist() == oracle.unpack(words[:7].numpy(), fields).tolist()


def test_words_of_zero_points_in_gemvs_layout():
    """As AutoAWQ counts them: eight to a word, two words at least for 64 inputs, four for 32, eight for 16."""
    assert [gemv_words(groups, 128) for groups in (1, 8, 9, 17)] == [1, 1, 2, 3]
    assert [gemv_words(groups, 64) for groups in (1, 16, 17)] == [2, 2, 4]
    assert [gemv_words(groups, 32) for groups in (1, 32, 33)] == [4, 4, 8]
    assert [gemv_words(groups, 16) for groups in (1, 64, 65)] == [8, 8, 16]
    for size in (16, 32, 64, 128, 4096):
        assert all(gemv_words(groups, size) == oracle.zero_words(groups, size) for groups in range(1, 300))


def test_what_a_scheme_calls_itself():
    assert build(group_size=64).describe() == "awq 4-bit group 64 asym"
    assert build(group_size=-1, zero_point=False, version="GEMV").describe() == "awq 4-bit per channel sym gemv"
    assert build(group_size=64).weight_spec().element is ElementType.UINT4
    assert build(group_size=64).weight_spec().granularity == PerGroup(64)
    assert build(group_size=-1, zero_point=False).weight_spec().granularity == PerChannel()
    assert build(group_size=64).recipes() == {}


@pytest.mark.parametrize("version", ["exllama", "exllamav2", "ipex", "EXLLAMA", "gemm"])
def test_versions_that_name_a_kernel_for_gemms_layout(version):
    assert build(group_size=64, version=version) == build(group_size=64)


def changed(scheme: AWQScheme, **changes: object):
    layer = stored_layer(scheme, 16, 64)
    return replace(scheme.decode(layer.tensors, layer.shape, "layer"), **changes)


ASYM, SYM = build(group_size=32), build(group_size=32, zero_point=False)
NOT_STORABLE = {
    "another contract": (ASYM, changed(SYM), "a weight of int4 group 32"),
    "act-order": (ASYM, changed(ASYM, g_idx=torch.zeros(64, dtype=torch.int32)), "in another order"),
    "too few scales": (ASYM, changed(ASYM, scales=torch.ones(16, 1)), r"scales \[16, 1\]; expected \[16, 2\]"),
    "a code too large": (ASYM, changed(ASYM, codes=torch.full((16, 64), 16, dtype=torch.uint8)), "the code 16"),
    "a signed code too large": (SYM, changed(SYM, codes=torch.full((16, 64), 8, dtype=torch.int8)), "the code 16"),
    "a zero point too large": (ASYM, changed(ASYM, zeros=torch.full((16, 2), 99, dtype=torch.uint8)), "point 99"),
    "rows that fill no word": (
        ASYM, changed(ASYM, codes=torch.zeros(12, 64, dtype=torch.uint8), scales=torch.ones(12, 2)),
        "out_features 12 is not a multiple of 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_STORABLE)
def test_what_cannot_be_stored_is_refused(name):
    scheme, weight, text = NOT_STORABLE[name]
    with pytest.raises(ConvertError, match=text) as caught:
        scheme.encode(weight)
    assert caught.value.code == "QP-CONV-SPEC"


@pytest.mark.parametrize(
    ("params", "size", "text"),
    [
        ({"group_size": 32}, (12, 64), "out_features 12 is not a multiple of 8"),
        ({"group_size": 32}, (16, 80), "in_features 80 is not a multiple of group_size 32"),
        ({"group_size": 32, "version": "gemv"}, (16, 36), "in_features 36 is not a multiple of 8"),
        ({"group_size": 24, "version": "gemv"}, (16, 48), "not defined for groups of 24 inputs"),
        ({"group_size": -1, "version": "gemv"}, (16, 96), "not defined for groups of 96 inputs"),
    ],
)
def test_a_layer_that_has_no_place_in_the_layout(params, size, text):
    with pytest.raises(ConfigError, match=text) as caught:
        build(**params).params(LinearShape(*size))
    assert caught.value.code == "QP-CFG-FIELD"


def test_it_only_reads():
    with pytest.raises(NotImplementedError):
        ASYM.quantize(torch.ones(8, 32))


def test_the_plugin_imports_without_torch():
    code = (
        "import sys, quantplug_awq.plugin as p; p.quantplug_schemes(); p.quantplug_dialects(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
