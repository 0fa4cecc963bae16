"""
Rounding dense weights: codes are the nearest, scales follow their rule, and llm-compressor's bytes where rules agree.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx_files import SCHEMES, build, golden, same_bits

from quantplug_testkit.oracles.floats import decode, encode

GROUP = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
ELEMENT = {"mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn", "nvfp4": "float4_e2m1fn"}


def grouped(values: np.ndarray, size: int) -> np.ndarray:
    n, k = values.shape
    return np.pad(values, ((0, 0), (0, -k % size))).reshape(n, -1, size)


def octets(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def dense_weight(n: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return weights of every size: each row a power of two more, among them zeros and whole groups of zeros."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((n, k)) * 2.0 ** random.integers(-20, 12, (n, 1))
    values[random.random((n, k)) < 0.1] = 0
    values[0] = 0
    return torch.from_numpy(values).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    n=st.integers(1, 9),
    pairs=st.integers(1, 60),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_code_is_the_nearest_under_its_scale(name, n, pairs, dtype, seed):
    """The oracle rounds the quotient; what the format cannot reach becomes its largest value."""
    dense = dense_weight(n, 2 * pairs, seed, dtype)
    scheme = build(name)
    weight = scheme.quantize(dense)
    assert (weight.codes.shape, weight.spec) == (dense.shape, scheme.weight_spec())
    scales = weight.scale_values().numpy().repeat(GROUP[name], 1)[:, : dense.shape[1]]
    quotients = dense.float().numpy() / scales
    assert np.array_equal(octets(weight.codes), encode(quotients.astype(np.float64), ELEMENT[name]))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(SCHEMES)), n=st.integers(1, 9), pairs=st.integers(1, 60), seed=st.integers(0, 999))
def test_what_was_rounded_is_a_layer_like_others(name, n, pairs, seed):
    """Stored, read and stored again it keeps every bit, and every check passes."""
    scheme = build(name)
    weight = scheme.quantize(dense_weight(n, 2 * pairs, seed))
    stored = scheme.encode(weight)
    shape = scheme.shape_of({suffix: tuple(tensor.shape) for suffix, tensor in stored.items()}, "layer")
    again = scheme.decode(stored, shape, "layer")
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert all(same_bits(tensor, stored[suffix]) for suffix, tensor in scheme.encode(again).items())


@pytest.mark.parametrize(
    ("name", "largest", "byte"),
    [
        # ceil(log2(amax / 448)): the smallest power of two under which nothing is cut off
        ("mxfp8", 448.0, 127), ("mxfp8", 449.0, 128), ("mxfp8", 447.0, 127), ("mxfp8", 224.0, 126),
        ("mxfp8", 224.5, 127), ("mxfp8", 1.0, 119), ("mxfp8", 1.75, 119), ("mxfp8", 1.7578125, 120),
        # amax rounded to a power of two, over 4: up from 1.75 times the lower one
        ("mxfp4", 4.0, 127), ("mxfp4", 6.0, 127), ("mxfp4", 6.96875, 127), ("mxfp4", 7.0, 128), ("mxfp4", 8.0, 128),
        ("mxfp4", 3.484375, 126), ("mxfp4", 3.5, 127),
        # both ends
        ("mxfp8", 0.0, 0), ("mxfp4", 0.0, 0), ("mxfp8", 2.0**-133, 0), ("mxfp4", 2.0**-133, 0),
        ("mxfp8", 3.3895313892515355e38, 247), ("mxfp4", 3.3895313892515355e38, 253),
    ],
)  # fmt: skip
def test_the_power_of_two_that_a_largest_magnitude_gets(name, largest, byte):
    """On either side of every boundary of the rules in SPEC.md, whatever the sign."""
    for sign in (1, -1):
        dense = torch.zeros(1, 40)
        dense[0, 7] = sign * largest
        weight = build(name).quantize(dense)
        assert octets(weight.scales).tolist() == [[byte, 0]]


def test_the_powers_of_two_that_the_rule_of_mxfp8_gives():
    """Against the rule in float64, over every significand of bfloat16 and many exponents."""
    exponents = np.arange(-100, 100, 7)
    largest = (1 + np.arange(128)[:, None] / 128) * 2.0**exponents
    dense = torch.from_numpy(largest.reshape(-1, 1)).to(torch.bfloat16)
    found = octets(build("mxfp8").quantize(dense).scales)[:, 0].astype(int) - 127
    assert np.array_equal(found, np.ceil(np.log2(largest.ravel() / 448)).astype(int))


def test_ties_go_to_the_even_code():
    """0.25 to 0, 0.75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4; the sign of what becomes 0 stays."""
    dense = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.0, -5.0, -0.2, 0.0, 0.3, -2.6, 4.9]])
    weight = build("mxfp4").quantize(dense)
    assert octets(weight.scales).tolist() == [[127]]
    assert weight.codes[0].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8, 8, 14, 8, 0, 1, 13, 6]


@pytest.mark.parametrize("global_name", ["weight_global_scale", "weight_scale_2"])
def test_nvfp4_uses_the_whole_range_of_scales_and_codes(global_name):
    """The largest magnitude of all has the scale 448 and the code 6, and comes back within two roundings."""
    scheme = build("nvfp4", global_name=global_name)
    dense = dense_weight(7, 64, 3, torch.float32)
    weight = scheme.quantize(dense)
    row, column = divmod(int(dense.abs().argmax()), 64)
    assert weight.scales.float().max() == 448
    assert weight.codes[row, column] & 7 == 7
    found, wanted = float(weight.dequantize()[row, column]), float(dense[row, column])
    # the stored number, scale times factor, and scale times code
    assert abs(found - wanted) <= 3 * 2.0**-24 / (1 - 3 * 2.0**-24) * abs(wanted)


@pytest.mark.parametrize("global_name", ["weight_global_scale", "weight_scale_2"])
@pytest.mark.parametrize("size", [0.0, 2.0**-149, 1e-38, 3e38])
def test_nvfp4_of_zeros_and_of_the_smallest_and_largest_numbers(global_name, size):
    """The number that all scales share stays finite and above 0, scales above 0, and the result decodes."""
    scheme = build("nvfp4", global_name=global_name)
    dense = torch.full((2, 32), size)
    dense[1] *= -0.5
    weight = scheme.quantize(dense)
    stored = scheme.encode(weight)
    assert 0 < float(stored[global_name]) < float("inf")
    assert (octets(weight.scales) > 0).all()
    values = scheme.decode(stored, scheme.shape_of({s: tuple(t.shape) for s, t in stored.items()}, "l"), "l")
    assert torch.allclose(values.dequantize(), dense, rtol=2.0**-22, atol=2.0**-126)


def test_groups_do_not_see_each_other_and_a_short_one_is_not_filled_up():
    """Rounding a part alone gives the same codes and scales, but for the factor of a whole NVFP4 weight."""
    for name in ("mxfp8", "mxfp4"):
        dense = dense_weight(5, 72, 11)
        whole, part = build(name).quantize(dense), build(name).quantize(dense[2:4, 32:72])
        assert np.array_equal(octets(whole.codes)[2:4, 32:], octets(part.codes))
        assert np.array_equal(octets(whole.scales)[2:4, 1:], octets(part.scales))


def test_pieces_of_a_large_weight_are_rounded_alike(monkeypatch):
    """Rows are gone through in pieces; where they end shows nowhere."""
    from quantplug_mx import rounding

    dense = dense_weight(11, 48, 5)
    whole = {name: build(name).quantize(dense) for name in SCHEMES}
    monkeypatch.setattr(rounding, "_PIECE", 100)
    for name, weight in whole.items():
        again = build(name).quantize(dense)
        assert torch.equal(again.codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert np.array_equal(octets(again.scales), octets(weight.scales))


def test_quantizing_leaves_the_weight_alone():
    """Gradients, Hessians and strides change nothing."""
    for name in SCHEMES:
        dense = dense_weight(4, 64, 2, torch.float32)
        before = dense.clone()
        plain = build(name).quantize(dense)
        other = build(name).quantize(dense.t().contiguous().t().requires_grad_(), hessian=torch.eye(64))
        assert torch.equal(dense, before)
        assert torch.equal(plain.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert not other.codes.requires_grad


@pytest.mark.parametrize("case", ["ct-mxfp4", "ct-mxfp4a16"])
def test_llm_compressor_rounds_mxfp4_to_the_same_bytes(case):
    """From the same dense rows."""
    document = golden(case)
    scheme = build("mxfp4")
    stored = scheme.encode(scheme.quantize(document["dense"]))
    assert all(same_bits(stored[suffix], tensor) for suffix, tensor in document["tensors"].items())


@pytest.mark.parametrize("case", ["ct-mxfp8", "ct-mxfp8a16"])
def test_llm_compressor_rounds_mxfp8_to_the_same_bytes_but_for_one_boundary(case):
    """A largest magnitude of exactly 448 times a power of two gets twice the scale there: codes one exponent lower."""
    document = golden(case)
    scheme = build("mxfp8")
    stored = scheme.encode(scheme.quantize(document["dense"]))
    theirs, ours = octets(document["tensors"]["weight_scale"]), octets(stored["weight_scale"])
    largest = np.abs(grouped(document["dense"].double().numpy(), 32)).max(-1)
    boundary = np.frexp(largest)[0] == 0.875
    assert np.array_equal(theirs - ours, boundary)
    codes = grouped(octets(stored["weight"]), 32), grouped(octets(document["tensors"]["weight"]), 32)
    assert np.array_equal(codes[0][~boundary], codes[1][~boundary])


@pytest.mark.parametrize("case", ["ct-nvfp4", "ct-nvfp4a16"])
def test_nvfp4_is_no_worse_than_llm_compressors(case):
    """It computes its scales in bfloat16; under its own number, ours lose less in every sum of squares."""
    document = golden(case)
    from quantplug_mx.rounding import round_nvfp4

    stored = document["tensors"]["weight_global_scale"]
    rounded = round_nvfp4(document["dense"], 16, stored.reshape(()).double().reciprocal())
    scales = decode(octets(rounded.scales), "float8_e4m3fn") / stored.item()
    ours = decode(octets(rounded.codes), "float4_e2m1fn") * scales.repeat(16, 1)
    dense = document["dense"].double().numpy()
    assert ((ours - dense) ** 2).sum() <= ((document["dequantized"].double().numpy() - dense) ** 2).sum()
