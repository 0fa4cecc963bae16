"""The GPTQ oracle against its own rules, a second way to take a bit stream apart, and every code point."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug_testkit.oracles import canonical, gptq, linear
from quantplug_testkit.oracles.canonical import Segment
from quantplug_testkit.oracles.gptq import dequantize, pack_columns, pack_rows, unpack_columns, unpack_rows, zero_points

BITS = (2, 3, 4, 8)


def random_codes(seed, rows, columns, bits):
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize("module", [canonical, gptq, linear], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_worked_examples_hold(module):
    """What the modules' docstrings show is what they do."""
    result = doctest.testmod(module)
    assert result.attempted
    assert result.failed == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 5), st.sampled_from(BITS))
def test_unpacking_undoes_packing(seed, rows, columns, bits):
    """Along either axis, for any number of codes, whole words or not."""
    codes = random_codes(seed, rows, columns, bits)
    np.testing.assert_array_equal(unpack_rows(pack_rows(codes, bits), bits, rows), codes)
    np.testing.assert_array_equal(unpack_columns(pack_columns(codes, bits), bits, columns), codes)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4), st.sampled_from(BITS))
def test_unpacking_agrees_with_a_stream_of_single_bits(seed, words, columns, bits):
    """NumPy's own bit unpacking, little-endian, gives the same codes from any words."""
    packed = np.random.default_rng(seed).integers(-(2**31), 2**31, (words, columns)).astype(np.int32)
    count = words * 32 // bits
    stream = np.unpackbits(np.ascontiguousarray(packed.T).view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(columns, count, bits)
    expected = (fields.astype(np.int64) << np.arange(bits)).sum(-1).T
    np.testing.assert_array_equal(unpack_rows(packed, bits, count), expected)


@pytest.mark.parametrize("bits", BITS)
def test_packing_undoes_unpacking_of_every_word(bits):
    """Whole words survive the way through codes, the sign bit included."""
    words = np.array([[0], [-1], [-(2**31)], [2**31 - 1], [0x12345678], [-0x12345678]], np.int32)
    count = words.shape[0] * 32 // bits
    np.testing.assert_array_equal(pack_rows(unpack_rows(words, bits, count), bits), words)


def test_a_code_that_does_not_fit_is_refused():
    """Packing never cuts a code."""
    with pytest.raises(ValueError, match="a code of 9 does not fit into 3 bits"):
        pack_rows(np.array([[1], [9]], np.uint8), 3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_every_code_with_every_zero_point(bits, v2):
    """All pairs of code and stored zero point give `(code - zero) * scale`, where version 1 adds one and wraps."""
    levels = 1 << bits
    # every code in K, every stored zero point in N
    codes = np.repeat(np.arange(levels, dtype=np.uint8)[:, None], levels, axis=1)
    stored = np.arange(levels, dtype=np.uint8)[None]
    scale = np.float16(0.75)
    values = dequantize(
        pack_rows(codes, bits),
        pack_columns(stored, bits),
        np.full((1, levels), scale),
        np.zeros(levels, np.int32),
        bits,
        -1,
        v2=v2,
        sym=False,
    )
    for n in range(levels):
        zero = n if v2 else 0 if n == levels - 1 else n + 1
        assert values[n].tolist() == [(code - zero) * 0.75 for code in range(levels)]


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_file_has_its_zero_points_in_the_middle(bits):
    """What calls itself symmetric and is not is refused, not read in one of two ways."""
    middle = 1 << (bits - 1)
    qweight = pack_rows(random_codes(1, 32, 4, bits), bits)

    def read(stored, v2):
        qzeros = pack_columns(np.full((1, 4), stored, np.uint8), bits)
        return dequantize(qweight, qzeros, np.ones((1, 4), np.float16), None, bits, 32, v2=v2, sym=True)

    np.testing.assert_array_equal(read(middle - 1, v2=False), read(middle, v2=True))
    with pytest.raises(ValueError, match=rf"a symmetric file with zero points \[{middle - 1}\]"):
        read(middle - 1, v2=True)


@given(st.integers(0, 2**32 - 1), st.sampled_from((2, 4, 8)), st.integers(1, 40))
def test_adding_to_whole_words_undoes_subtracting_from_them(seed, bits, out_features):
    """A writer that packs first and subtracts then loses nothing, though fields borrow from each other."""
    zeros = random_codes(seed, 3, out_features, bits)
    ones = np.uint32(sum(1 << position for position in range(0, 32, bits)))
    stored = (pack_columns(zeros, bits).view(np.uint32) - ones).view(np.int32)
    np.testing.assert_array_equal(zero_points(stored, bits, out_features, v2=False, whole_words=True), zeros)


def test_the_two_ways_to_subtract_differ_after_a_zero_point_of_zero():
    """Zero points 0 and 5 are stored as 15 and 4 field by field, and as 15 and 3 word by word."""
    field, word = np.array([[0x4F]], np.int32), np.array([[0x3F]], np.int32)
    assert zero_points(field, 4, 2, v2=False).tolist() == [[0, 5]]
    assert zero_points(word, 4, 2, v2=False, whole_words=True).tolist() == [[0, 5]]


@given(st.integers(0, 2**32 - 1), st.sampled_from(BITS), st.sampled_from((16, 24, 32, 64, -1)), st.booleans())
def test_g_idx_assigns_each_input_to_its_group(seed, bits, group_size, permuted):
    """The stored form and the canonical form of the same weight mean the same values."""
    generator = np.random.default_rng(seed)
    in_features, out_features = 64, 5
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    g_idx = generator.permutation(canonical.group_index(in_features, group_size)) if permuted else None
    codes = random_codes(seed, in_features, out_features, bits)
    zeros = random_codes(seed + 1, groups, out_features, bits)
    scales = generator.uniform(0.5, 2, (groups, out_features)).astype(np.float16)
    found = dequantize(
        pack_rows(codes, bits), pack_columns(zeros, bits), scales, g_idx, bits, group_size, v2=True, sym=False
    )
    expected = Segment.of(codes.T, scales.T.astype(np.float64), zeros.T, g_idx, group_size, bits).values()
    np.testing.assert_array_equal(found, expected)


def test_products_of_magnitudes_bound_products():
    """`|x W^T| <= |x| |W|^T`, with equality when nothing cancels."""
    generator = np.random.default_rng(0)
    x, values = generator.standard_normal((5, 7)), generator.standard_normal((3, 7))
    assert (np.abs(linear.linear(x, values)) <= linear.abs_linear(x, values)).all()
    np.testing.assert_array_equal(linear.linear(np.abs(x), np.abs(values)), linear.abs_linear(x, values))
