"""
Quantizing: the nearest code for every weight, contracts that always hold, and the two recipes from end to end.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_files import build, stored_layer, tile

from quantplug.errors import ConvertError
from quantplug.spec import ActivationSpec, ElementType, LinearShape, PerBlock, PerChannel, PerGroup, PerTensor
from quantplug_int8.scheme import Int8Scheme

granularities = st.one_of(
    st.builds(PerTensor),
    st.builds(PerChannel),
    st.builds(PerGroup, st.integers(1, 70)),
    st.builds(PerBlock, st.integers(1, 9), st.integers(1, 40)),
)


def per_element(tensor: torch.Tensor, scheme: Int8Scheme, shape: LinearShape) -> torch.Tensor:
    """Return what belongs to each element, float64 `[N, K]`, by its row and input."""
    rows, inputs = tile(scheme, shape)
    n, k = torch.arange(shape.out_features) // rows, torch.arange(shape.in_features) // inputs
    return tensor.double()[n][:, k]


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from((8, 4)),
    granularity=granularities,
    symmetric=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    n=st.integers(1, 20),
    k=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    shift=st.sampled_from((0.0, 0.03, -0.1)),
)
def test_every_weight_gets_a_nearest_code_and_comes_back_from_the_file(
    bits, granularity, symmetric, dtype, n, k, seed, shift
):
    """
    No code of the scale that was chosen is nearer, but for the rounding of one float32 quotient, and none is farther
    than the range allows.
    """
    symmetric = symmetric or isinstance(granularity, PerBlock)
    scheme = Int8Scheme(bits, granularity, symmetric)
    dense = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02 + shift).to(dtype)
    weight = scheme.quantize(dense)
    assert weight.spec == scheme.weight_spec()
    assert weight.scales.dtype == torch.bfloat16
    assert bool((weight.scales > 0).all())

    shape = LinearShape(n, k)
    scale = per_element(weight.scales, scheme, shape)
    zero = 0 if weight.zeros is None else per_element(weight.zeros, scheme, shape)
    bottom = -(1 << (bits - 1)) if symmetric else 0
    grid = torch.arange(bottom, bottom + (1 << bits), dtype=torch.float64).view(-1, 1, 1)
    nearest = ((grid - zero) * scale - dense.double()).abs().amin(0)
    taken = ((weight.codes.double() - zero) * scale - dense.double()).abs()
    # The quotient is at most 2^bits and is rounded to float32 before it is rounded to a code.
    assert bool((taken <= nearest + scale * 2.0 ** (bits - 24)).all())
    # Half a step inside the range. At its ends up to 2^bits steps times the scale's own rounding (2^-9) more, half a
    # step for the zero point, and half a step where a symmetric range ends beyond the largest code.
    assert bool((taken <= scale * (0.5 + 2.0 ** (bits - 9) + 0.5)).all())

    stored = scheme.encode(weight)
    again = scheme.decode(stored, scheme.shape_of({s: tuple(t.shape) for s, t in stored.items()}, "layer"), "layer")
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_on_the_grid_stays(bits, symmetric):
    """A layer that uses the whole range of codes, with a scale that bfloat16 holds, comes back exactly."""
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half).float().expand(3, -1)
    if symmetric:
        # A symmetric range is spanned by its largest magnitude: -128 at 127.5 codes to a side.
        scale = torch.tensor([0.5, 1.0, 0.25]).view(-1, 1)
        dense = codes * scale
        weight = build(bits=bits).quantize(dense)
        assert bool(((weight.codes.float() - codes).abs() <= 1).all())
    else:
        dense = (codes + 3) * torch.tensor([0.5, 1.0, 0.25]).view(-1, 1)
        weight = build(bits=bits, symmetric=False).quantize(dense)
        assert weight.zeros.tolist() == [[half - 3]] * 3
        assert torch.equal(weight.dequantize(), dense)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-40, 3e38, -3e38])
def test_extreme_weights_stay_finite(value, symmetric):
    """Nothing but zeros, subnormal numbers, and the ends of what float32 holds."""
    dense = torch.full((3, 8), value)
    dense[0, 0] = -value
    weight = build(symmetric=symmetric).quantize(dense)
    values = weight.dequantize()
    assert bool(values.isfinite().all())
    # As above: half a step, half for the end of the range, half for the scale's rounding over 2^8 steps.
    assert bool(((values - dense).abs() <= weight.scales.float() * 1.5).all())


def test_quantizing_in_pieces_is_quantizing_at_once(monkeypatch):
    from quantplug_int8 import rounding

    dense = torch.randn(13, 40, generator=torch.Generator().manual_seed(2))
    for scheme in (build(), build(strategy="group", group_size=7), build(strategy="block", block_n=4, block_k=16)):
        whole = scheme.quantize(dense)
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "_PIECE", 100)
            pieces = scheme.quantize(dense)
        assert torch.equal(whole.codes, pieces.codes)
        assert torch.equal(whole.scales, pieces.scales)


def test_a_hessian_changes_nothing():
    dense = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(build().quantize(dense, hessian=torch.eye(8)).codes, build().quantize(dense).codes)


def test_stored_scales_of_x_cannot_be_made_up():
    with pytest.raises(ConvertError, match="never measured; expected a dynamic activation") as caught:
        build(activation="int8/tensor/static").quantize(torch.ones(4, 8))
    assert caught.value.code == "QP-CONV-SPEC"


def test_the_recipes():
    """8 bits per channel; x as it is, or as int8 per token."""
    recipes = {name: build(**params) for name, params in Int8Scheme.recipes().items()}
    assert recipes["int8"] == build()
    assert recipes["w8a8"].activation == ActivationSpec(ElementType.INT8, "token", dynamic=True)
    assert {scheme.weight_spec() for scheme in recipes.values()} == {build().weight_spec()}


def test_layers_without_rows_or_inputs_do_no_harm():
    for n, k in ((0, 8), (4, 0)):
        for scheme in (build(), build(strategy="tensor"), build(symmetric=False, strategy="group", group_size=4)):
            weight = scheme.quantize(torch.empty(n, k))
            assert weight.codes.shape == (n, k)
    assert stored_layer(build(), 4, 8).values().shape == (4, 8)
