"""
Packing against the NumPy oracle, which shares nothing with it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug_gptq.layout import one_per_field, pack_rows, unpack_rows
from quantplug_testkit.oracles import gptq as oracle

BITS = (2, 3, 4, 8)


def random_codes(bits: int, rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


@settings(max_examples=120, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 130),
    columns=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_is_the_oracles_and_unpacking_undoes_it(bits, rows, columns, seed):
    """Any width, any length (also in the middle of a word), any number of streams (also not eight at a time)."""
    codes = random_codes(bits, rows, columns, seed)
    words = pack_rows(torch.from_numpy(codes), bits)
    assert np.array_equal(words.numpy(), oracle.pack_rows(codes, bits))
    fields = unpack_rows(words, bits)
    assert np.array_equal(fields[:rows].numpy(), codes)
    assert not fields[rows:].any()


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 20), columns=st.integers(1, 33), seed=st.integers(0, 2**32 - 1))
def test_any_words_unpack_as_the_oracle_says(bits, rows, columns, seed):
    """Words of random bits, the sign bit included, and a non-contiguous tensor of them."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, columns), dtype=np.int64).astype(np.int32)
    count = rows * 32 // bits
    fields = unpack_rows(torch.from_numpy(words.T.copy()).t(), bits)
    assert np.array_equal(fields[:count].numpy(), oracle.unpack_rows(words, bits, count))


@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_place_of_a_period(bits):
    """Each code alone in each place of one period, among zeros and among ones."""
    places = 32 if bits == 3 else 32 // bits
    top = (1 << bits) - 1
    for around in (0, top):
        cases = [(place, code) for place in range(places) for code in range(top + 1)]
        codes = np.full((places, len(cases)), around, np.uint8)
        for column, (place, code) in enumerate(cases):
            codes[place, column] = code
        words = pack_rows(torch.from_numpy(codes), bits)
        assert np.array_equal(words.numpy(), oracle.pack_rows(codes, bits))
        assert np.array_equal(unpack_rows(words, bits).numpy(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_subtracting_the_middle_gives_twos_complement(bits):
    """The offset that makes codes of a symmetric file signed."""
    codes = torch.arange(1 << bits, dtype=torch.uint8).repeat_interleave(8).view(-1, 8)
    middle = 1 << (bits - 1)
    signed = unpack_rows(pack_rows(codes, bits), bits, subtract=middle).view(torch.int8)
    assert torch.equal(signed[: len(codes)].int(), codes.int() - middle)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 7, 1024])
def test_a_layer_larger_than_one_piece_is_read_whole(bits, columns):
    """The pieces that the work is cut into meet without a gap."""
    rows = 32 * (1 + (1 << 18) // (columns * 32))
    codes = torch.from_numpy(random_codes(bits, rows, columns, 5))
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits)[:rows], codes)


def test_one_per_field():
    """The words that GPTQModel takes from packed zero points."""
    assert [hex(one_per_field(bits)) for bits in (2, 4, 8)] == ["0x55555555", "0x11111111", "0x1010101"]
