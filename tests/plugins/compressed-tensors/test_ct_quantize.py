"""
Dense weights put on evenly spaced values: nothing nearer than what is chosen, and what is chosen survives a file.
"""

from __future__ import annotations

import pytest
import torch
from ct_files import build
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.errors import ConvertError
from quantplug_compressed_tensors.scheme import PackScheme

KINDS = ({"group_size": 16}, {"group_size": 50}, {}, {"strategy": "tensor"})


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    kind=st.sampled_from(KINDS),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(("bfloat16", "float16", "float32")),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    n=st.integers(1, 20),
    k=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_no_code_is_nearer_and_everything_can_be_stored(bits, kind, symmetric, scale_dtype, dtype, n, k, seed):
    """
    Against all codes of the chosen scale and zero point, in float64; the same after the file.

    The quotient, at most 2^bits where it counts, is rounded to float32 first; so a tie may go the wrong way by that.
    """
    scheme = build(bits=bits, symmetric=symmetric, scale_dtype=scale_dtype, **kind)
    dense = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.004).to(dtype)
    weight = scheme.quantize(dense)
    assert str(weight.scales.dtype) == f"torch.{scale_dtype}"
    assert torch.equal(weight.scales.to(torch.bfloat16).to(weight.scales.dtype), weight.scales)
    assert bool((weight.scales > 0).all())
    index = weight.group_index()
    scales = weight.scales.double()[:, index].expand(n, k)
    zeros = 0 if weight.zeros is None else weight.zeros.double()[:, index]
    low = -(1 << (bits - 1)) if symmetric else 0
    candidates = torch.arange(low, low + (1 << bits), dtype=torch.float64).view(-1, 1, 1)
    distance = ((candidates - zeros) * scales - dense.double()).abs().amin(0)
    taken = ((weight.codes.double() - zeros) * scales - dense.double()).abs()
    assert bool((taken <= distance + scales * (2 << bits) * 2.0**-24).all())
    stored = scheme.encode(weight)
    shape = scheme.shape_of({suffix: tuple(t.shape) for suffix, t in stored.items()}, "layer")
    if shape.in_features == k:  # else only the model knows
        again = scheme.decode(stored, shape, "layer")
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert again.spec == weight.spec


def test_scales_span_each_range():
    """Twice the largest magnitude, or the range with 0 in it, over the number of steps, in eight significant bits."""
    dense = torch.tensor([[-3.0, 1.0, 0.0, 2.25], [4.0, 5.0, 9.0, 7.75]])
    weight = build(bits=4, group_size=2).quantize(dense)
    assert weight.scales.tolist() == [[0.400390625, 0.30078125], [0.66796875, 1.203125]]
    weight = build(bits=4, group_size=2, symmetric=False).quantize(dense)
    assert weight.scales.tolist() == [[0.267578125, 0.150390625], [0.333984375, 0.6015625]]
    assert weight.zeros.tolist() == [[11, 0], [0, 0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric):
    """A group of zeros, and one weight so small that its scale is the smallest normal number."""
    dense = torch.zeros(2, 64, dtype=torch.bfloat16)
    dense[1, 0] = 2.0**-130
    weight = build(bits=4, group_size=32, symmetric=symmetric).quantize(dense)
    assert bool(weight.scales.isfinite().all())
    assert torch.equal(weight.dequantize(torch.bfloat16)[0], dense[0])
    assert bool((weight.dequantize().abs() <= 2.0**-120).all())


def test_static_scales_of_x_cannot_be_made_up():
    with pytest.raises(ConvertError, match="never measured") as caught:
        build(bits=4, activation="int8/tensor/static").quantize(torch.ones(2, 8))
    assert caught.value.code == "QP-CONV-SPEC"


def test_every_recipe_builds():
    """The names that callers know, and what they stand for."""
    recipes = {name: PackScheme.build(params, name) for name, params in PackScheme.recipes().items()}
    assert recipes.keys() == {
        "int4-g32", "int4-g64", "int4-g128", "int4-channel", "uint4-g32", "uint4-g64", "uint4-g128", "q4_0",
    }  # fmt: skip
    assert recipes["uint4-g64"].describe() == "ct-pack int4 group 64 asym"
    assert recipes["int4-channel"].describe() == "ct-pack int4 per channel sym"
    assert recipes["q4_0"].describe() == "ct-pack int4 group 32 sym q4_0"
