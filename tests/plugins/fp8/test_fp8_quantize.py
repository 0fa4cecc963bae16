"""
Rounding dense weights: the least scale that covers a tile, the nearest codes, every shape and every edge.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_files import ELEMENTS, expanded, octets, tile
from hypothesis import given, settings
from hypothesis import strategies as st

import quantplug_fp8.tiles
from quantplug.errors import ConvertError
from quantplug.spec import PerBlock
from quantplug_fp8.scheme import FP8Scheme
from quantplug_testkit.oracles import floats

STRATEGIES: list[dict[str, object]] = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 16},
    {"strategy": "block", "block_n": 16, "block_k": 24},
    {"strategy": "block", "block_n": 1 << 20, "block_k": 7},
]
U = 2.0**-24
"""Unit roundoff of float32."""


def largest_of_tiles(dense: np.ndarray, params: dict[str, object]) -> np.ndarray:
    n, k = tile(params, *dense.shape)
    rows, columns = range(0, dense.shape[0], n), range(0, dense.shape[1], k)
    return np.array([[np.abs(dense[i : i + n, j : j + k]).max() for j in columns] for i in rows])


def check(dense: torch.Tensor, params: dict[str, object]) -> None:
    """Compare with what the oracle says of the same numbers in float64."""
    element = str(params.get("element", ELEMENTS[0]))
    scheme = FP8Scheme.build(params, "test")
    weight = scheme.quantize(dense)
    numbers = dense.to(torch.float64).numpy()
    top = floats.largest(element)
    largest = largest_of_tiles(numbers, params).astype(np.float32)
    wanted = np.where(largest == 0, np.float32(1), np.maximum(largest / np.float32(top), np.float32(2.0**-126)))
    assert weight.scales.dtype == torch.float32
    assert np.array_equal(weight.scales.numpy(), wanted)
    quotients = numbers / expanded(wanted.astype(np.float64), params, *numbers.shape)
    codes = floats.decode(octets(weight.codes), element)
    nearest = floats.decode(floats.encode(quotients, element), element)
    # The quotient is rounded to float32 (or below its smallest step) before it is rounded to a code, so that near the
    # middle of two codes either may come.
    slack = 2 * U * np.abs(quotients) + 2.0**-149
    assert (np.abs(codes - quotients) <= np.abs(nearest - quotients) + slack).all()
    stored = scheme.encode(weight)
    again = scheme.decode(stored, scheme.shape_of({k: tuple(t.shape) for k, t in stored.items()}, "layer"), "layer")
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.spec == weight.spec


@settings(max_examples=60, deadline=None)
@given(
    params=st.sampled_from(STRATEGIES),
    element=st.sampled_from(ELEMENTS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    n=st.integers(1, 40),
    k=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_scales_are_the_least_that_cover_and_codes_the_nearest(params, element, dtype, n, k, seed):
    """Every granularity, element and source dtype, tiles cut off at both edges; rows of very different size."""
    random = np.random.default_rng(seed)
    dense = random.standard_normal((n, k)) * 2.0 ** random.integers(-10, 6, (n, 1))
    check(torch.from_numpy(dense.astype(np.float32)).to(dtype), {**params, "element": element})


@pytest.mark.parametrize("params", STRATEGIES)
def test_a_weight_that_is_worked_on_in_strips(monkeypatch, params):
    """Strips of about five rows, which end where tiles do."""
    monkeypatch.setattr(quantplug_fp8.tiles, "_CHUNK", 5 * 24)
    generator = torch.Generator().manual_seed(1)
    check(torch.randn(50, 24, generator=generator).to(torch.bfloat16), params)


def test_a_block_larger_than_the_weight_is_no_larger_than_it():
    """Or a weight would be padded to a million rows."""
    assert quantplug_fp8.tiles.tile_of(PerBlock(1 << 20, 1 << 20), 50, 24) == (50, 24)
    assert quantplug_fp8.tiles.tile_of(PerBlock(128, 128), 0, 0) == (1, 1)


@pytest.mark.parametrize("params", STRATEGIES)
def test_zeros_stay_zeros_under_a_scale_of_one(params):
    """A tile of zeros has a scale that every reader can divide by."""
    dense = torch.zeros(32, 48)
    dense[16:, 24:] = 3.0
    weight = FP8Scheme.build(params, "test").quantize(dense)
    assert torch.equal(weight.dequantize(), dense) or params["strategy"] == "tensor"
    alone = FP8Scheme.build(params, "test").quantize(torch.zeros(32, 48))
    assert bool((alone.scales == 1).all())
    assert not octets(alone.codes).any()


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 3e38, 65504.0])
def test_the_smallest_and_the_largest_numbers(largest):
    """Scales neither vanish nor overflow, and nothing becomes NaN."""
    dense = torch.tensor([[largest, -largest, largest / 3, 0.0]])
    for params in STRATEGIES:
        check(dense, params)


def test_what_every_code_stands_for_comes_back_as_that_code():
    """The largest code in each row makes the scale 1, so that all others are exact."""
    for element in ELEMENTS:
        values = floats.values(element)
        finite = np.flatnonzero(np.isfinite(values))
        dense = torch.from_numpy(values[finite].astype(np.float32))[None]
        weight = FP8Scheme.build({"strategy": "channel", "element": element}, "test").quantize(dense)
        assert float(weight.scales) == 1.0
        assert np.array_equal(octets(weight.codes)[0], finite)


def test_the_source_is_not_changed_and_strides_are_free():
    """Not by float32 either, which needs no conversion."""
    dense = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    before = dense.clone()
    scheme = FP8Scheme.build({}, "test")
    turned = scheme.quantize(dense.t())
    assert torch.equal(dense, before)
    assert torch.equal(turned.dequantize(), scheme.quantize(dense.t().contiguous()).dequantize())


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"strategy": "tensor", "activation": "float8_e4m3fn/tensor/static"}, "needs calibrated activations"),
        ({"scale_name": "either"}, "does not say which name scales get"),
    ],
)
def test_parameters_that_only_describe_files_are_refused(params, text):
    """Weights do not tell the scale of x, and a file needs one name."""
    with pytest.raises(ConvertError, match=text) as caught:
        FP8Scheme.build(params, "test").quantize(torch.ones(4, 4))
    assert caught.value.code == "QP-CONV-SCHEME"


def test_recipes():
    """The names under which dense weights are quantized on load and by convert."""
    built = {name: FP8Scheme.build(params, name).describe() for name, params in FP8Scheme.recipes().items()}
    assert built == {
        "fp8": "fp8 e4m3fn per channel, x float8_e4m3fn per token, dynamic",
        "fp8-tensor": "fp8 e4m3fn per tensor, x float8_e4m3fn per token, dynamic",
        "fp8-block": "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic",
    }
