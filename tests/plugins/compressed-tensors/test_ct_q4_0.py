"""
The q4_0 grid: whatever some scale and codes can have produced keeps its bits, and other weights are rounded to nearest.

Blocks are made in NumPy, rounded to bfloat16 by ml_dtypes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from ct_files import build
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantplug.errors import ConvertError
from quantplug_compressed_tensors import floats, q4_0

BLOCKS = 64
DTYPES = {
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16), "float16": (np.float16, torch.float16),
    "float32": (np.float32, torch.float32),
}  # fmt: skip
CODES = {
    "all": (-8, 7), "no -8": (-7, 7), "small ones": (-3, 3), "ones": (-1, 1), "none below 0": (0, 7),
    "none above 0": (-8, 0), "nothing": (0, 0),
}  # fmt: skip
# Bits of positive float32 scales: all that are finite with eightfold products, subnormal ones, about those of bfloat16.
SCALES = {
    "float32": (0x0080_0000, 0x7D7F_FFFF), "subnormal float32": (0, 0x0080_0000), "few units": (0, 0x0012_0000),
}  # fmt: skip


def grid_blocks(kind: str, codes: str, dtype: str, seed: int) -> torch.Tensor:
    """Return `[BLOCKS, 32]`, products of random scales and codes, in a dtype of checkpoints; finite."""
    random = np.random.default_rng(seed)
    if kind.endswith("float16"):
        top = 0x0400 if kind.startswith("subnormal") else 0x7C00
        scales = random.integers(0, top, BLOCKS, dtype=np.uint16).view(np.float16).astype(np.float32)
    else:
        scales = random.integers(*SCALES[kind], BLOCKS, dtype=np.uint32).view(np.float32)
    scales *= random.choice([-1, 1], BLOCKS).astype(np.float32)
    low, high = CODES[codes]
    products = random.integers(low, high + 1, (BLOCKS, 32)).astype(np.float32) * scales[:, None]
    given_, wanted = DTYPES[dtype]
    with np.errstate(over="ignore"):
        rounded = products.astype(given_)
    rounded = rounded[np.isfinite(rounded.astype(np.float32)).all(1)]
    bits = {2: np.int16, 4: np.int32}[rounded.dtype.itemsize]
    return torch.from_numpy(rounded.view(bits).copy()).view(wanted)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


ANY_GRID = given(
    kind=st.sampled_from(("float16", "subnormal float16", *SCALES)),
    codes=st.sampled_from(tuple(CODES)),
    dtype=st.sampled_from(tuple(DTYPES)),
    seed=st.integers(0, 10_000),
)


def check_that_bits_are_kept(kind: str, codes: str, dtype: str, seed: int) -> None:
    """Signs of zeros included; and where the scale was a float16, a float16 is found."""
    dense = grid_blocks(kind, codes, dtype, seed)
    found, scales = q4_0.quantize(dense, torch.float16)
    assert found.dtype == torch.int8
    assert bool((found >= -8).all())
    assert bool((found <= 7).all())
    values = (found.float() * scales.float()).to(dense.dtype)
    assert torch.equal(bits_of(values), bits_of(dense))
    if kind.endswith("float16"):
        assert scales.dtype == torch.float16


def test_the_largest_float16_is_found_where_a_shorter_number_lies_above_it() -> None:
    """65504 and 65536 give the same bfloat16 weights; only one of them is a float16."""
    check_that_bits_are_kept("float16", "all", "bfloat16", 691)


@settings(max_examples=5, deadline=None)
@ANY_GRID
@example(kind="float16", codes="all", dtype="bfloat16", seed=0)
@example(kind="float16", codes="no -8", dtype="bfloat16", seed=1)
@example(kind="float16", codes="small ones", dtype="bfloat16", seed=0)
@example(kind="subnormal float16", codes="all", dtype="bfloat16", seed=2)
@example(kind="few units", codes="small ones", dtype="bfloat16", seed=3)
@example(kind="float32", codes="all", dtype="bfloat16", seed=4)
@example(kind="float16", codes="nothing", dtype="bfloat16", seed=5)
def test_a_weight_that_lies_on_the_grid_keeps_its_bits(kind, codes, dtype, seed):
    """Every kind of scale and block that a checkpoint may have."""
    check_that_bits_are_kept(kind, codes, dtype, seed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@ANY_GRID
def test_many_weights_that_lie_on_the_grid_keep_their_bits(kind, codes, dtype, seed):
    """The same, 25,000 blocks."""
    check_that_bits_are_kept(kind, codes, dtype, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_block_of_a_few_smallest_units_that_has_a_scale_is_found(dtype):
    """All weights of one magnitude pattern near 0, exhaustively: pairs of values that one scale and two codes give."""
    unit = floats.unit(dtype)
    pairs = torch.cartesian_prod(torch.arange(-12.0, 13), torch.arange(-12.0, 13)) * unit
    dense = torch.zeros(len(pairs), 32, dtype=dtype)
    dense[:, :2] = pairs.to(dtype)
    scales = (
        torch.arange(1, 12 * 16 + 9, dtype=torch.float64) / 16 * unit
    )  # ties of halves, quarters and eighths lie on it
    given_ = {}
    for scale in (*scales.tolist(), *(-scales).tolist()):
        products = (torch.arange(-8, 8, dtype=torch.float32) * torch.tensor(scale, dtype=torch.float32)).to(dtype)
        for one in products.tolist():
            given_.update(dict.fromkeys((one, other) for other in products.tolist()))
    codes, found = q4_0.quantize(dense, torch.float32)
    back = (codes.float() * found).to(dtype)
    possible = torch.tensor([(one, other) in given_ for one, other in dense[:, :2].float().tolist()])
    assert int(possible.sum()) > 300
    assert torch.equal(back[possible].float(), dense[possible].float())


def test_the_scale_may_have_more_bits_than_the_largest_weight_shows():
    """The scale is 1.0830078125 / 1024, eleven bits; bfloat16(-8 d) / -8 has eight, and gives other weights."""
    scale = np.float32(1.0830078125 / 1024)
    codes = np.arange(-8, 8, dtype=np.float32).repeat(2)
    dense = (
        torch.from_numpy((codes * scale).astype(ml_dtypes.bfloat16).view(np.int16)).view(torch.bfloat16).unsqueeze(0)
    )
    guess = dense.float().amin() / -8
    assert not torch.equal((torch.from_numpy(codes) * guess).bfloat16(), dense[0])
    found, scales = q4_0.quantize(dense, torch.float16)
    assert torch.equal((found.float() * scales.float()).bfloat16(), dense)
    assert found[0].tolist() == codes.tolist()


def test_scales_are_as_simple_as_the_weights_allow():
    """Few constraints leave a power of two; so bfloat16 holds it, too."""
    dense = torch.zeros(1, 32, dtype=torch.bfloat16)
    dense[0, 0] = -8.0
    _, scales = q4_0.quantize(dense, torch.float16)
    assert scales.tolist() == [[1.0]]


def test_other_weights_are_rounded_to_nearest_on_the_largest_over_minus_eight():
    """llama.cpp's choice; no code is nearer."""
    dense = torch.randn(40, 96, generator=torch.Generator().manual_seed(5)).bfloat16()
    codes, scales = q4_0.quantize(dense, torch.float16)
    blocks = dense.float().view(40, 3, 32)
    peaks = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)
    assert torch.equal(scales.float().abs(), peaks.abs() / 8)  # of two largest with either sign, one counts
    products = torch.arange(-8.0, 8).view(16, 1, 1, 1) * scales.float().unsqueeze(2)
    taken = (codes.float().view(40, 3, 32) * scales.float().unsqueeze(2) - blocks).abs()
    assert bool((taken <= (products - blocks).abs().amin(0)).all())


def test_the_last_block_may_be_short():
    """40 inputs: a block of 32, and one of 8 that is filled up with zeros and cut off again."""
    dense = torch.zeros(2, 40, dtype=torch.bfloat16)
    dense[:, ::3] = 0.5
    codes, scales = q4_0.quantize(dense, torch.float16)
    assert (codes.shape, scales.shape) == ((2, 40), (2, 2))
    index = torch.arange(40) // 32
    assert torch.equal((codes.float() * scales.float()[:, index]).bfloat16(), dense)


def test_one_block_that_needs_float32_makes_all_scales_float32():
    """A scale below what float16 has; and the scheme says so where a file was promised float16."""
    dense = torch.full((1, 64), 2.0**-40, dtype=torch.bfloat16)
    dense[0, :32] = 0.25
    scheme = build(bits=4, group_size=32, grid="q4_0")
    weight = scheme.quantize(dense)
    assert weight.spec.scale_dtype == "float32"
    assert torch.equal(weight.dequantize(torch.bfloat16), dense)
    with pytest.raises(ConvertError, match=r"scales that need float32.*scale_dtype=float32") as caught:
        scheme.encode(weight)
    assert caught.value.code == "QP-CONV-SPEC"
    wide = build(bits=4, group_size=32, grid="q4_0", scale_dtype="float32")
    stored = wide.encode(wide.quantize(dense))
    assert stored["weight_scale"].dtype == torch.float32


def test_the_scheme_stores_what_the_grid_gives():
    """A layer on the grid, through a file and back, bit for bit; scales in float16."""
    dense = grid_blocks("float16", "all", "bfloat16", 7).view(-1, 64)
    scheme = build(bits=4, group_size=32, grid="q4_0")
    stored = scheme.encode(scheme.quantize(dense))
    assert stored["weight_scale"].dtype == torch.float16
    shape = scheme.shape_of({suffix: tuple(tensor.shape) for suffix, tensor in stored.items()}, "layer")
    values = build(bits=4, group_size=32).decode(stored, shape, "layer").dequantize(torch.bfloat16)
    assert torch.equal(bits_of(values), bits_of(dense.contiguous()))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 0x7F7F), dtype=st.sampled_from(("bfloat16", "float16")))
@example(bits=0x7F7F, dtype="bfloat16")
@example(bits=0x7BFF, dtype="float16")
@example(bits=1, dtype="bfloat16")
@example(bits=0x0080, dtype="bfloat16")
def test_intervals_end_where_rounding_changes(bits, dtype):
    """The limits round to the number, and their neighbours do not."""
    maker, wanted = DTYPES[dtype]
    number = np.array([bits if dtype == "bfloat16" else min(bits, 0x7BFF)], np.uint16).view(maker)
    with np.errstate(over="ignore"):
        low, high = (
            limit.numpy() for limit in floats.rounding_interval(torch.from_numpy(number.view(np.int16)).view(wanted))
        )
        assert low.astype(maker) == high.astype(maker) == number
        assert np.nextafter(low, np.float32(-1)).astype(maker) != number
        assert np.nextafter(high, np.float32("inf")).astype(maker) != number


def test_factors_end_where_products_leave_the_limit():
    """The least and greatest float32 whose rounded product is within a limit, where the quotient misses them, too."""
    random = np.random.default_rng(6)
    products = torch.from_numpy(random.integers(1 << 3, 0x7F00_0000, 20_000, dtype=np.int32)).view(torch.float32)
    factors = torch.from_numpy(random.integers(1, 9, 20_000).astype(np.float32))
    least, most = floats.least_factor(products, factors), floats.greatest_factor(products, factors)
    assert bool((least * factors >= products).all())
    assert bool((floats.preceding(least) * factors < products).all())
    assert bool((most * factors <= products).all())
    assert bool((floats.following(most) * factors > products).all())
    assert not torch.equal(least, products / factors)


@pytest.mark.parametrize(("weights", "step"), [((-8, 7, 1), 0.5), ((-26, 19, 10), floats.unit(torch.bfloat16))])
def test_zeros_of_the_other_sign_are_still_zeros(weights, step):
    """-8 forces the scale's sign, and with it that of zeros; values count more than the sign of a zero."""
    dense = torch.zeros(1, 32, dtype=torch.bfloat16)
    dense[0, :4] = torch.tensor([*weights, -0.0]) * step
    codes, scales = q4_0.quantize(dense, torch.bfloat16)
    assert codes[0, 0] == -8
    assert torch.equal((codes.float() * scales.float()).bfloat16(), dense)
