"""
Layers that compressed-tensors and llm-compressor wrote: their own bytes, their own dequantized weights.
"""

from __future__ import annotations

import pytest
import torch
from int8_files import GOLDEN, build, read, tensor

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def scheme_of(document: dict):
    """Build the scheme from the words of compressed-tensors, without its dialect."""
    weights, x = document["weights"], document["input_activations"]
    params = {
        "bits": weights["num_bits"], "strategy": weights["strategy"], "symmetric": weights["symmetric"],
        **({"group_size": weights["group_size"]} if weights["strategy"] == "group" else {}),
    }  # fmt: skip
    if x is not None:
        element = "float8_e4m3fn" if x["type"] == "float" else "int8" if x["symmetric"] else "uint8"
        params["activation"] = f"{element}/{x['strategy']}/{'dynamic' if x['dynamic'] else 'static'}"
    return build(**params)


def test_the_cases_are_all_there():
    """Three strategies, symmetric or not, two widths; and four checkpoints of a real model."""
    assert len(CASES) == 16


@pytest.mark.parametrize("case", CASES)
def test_decode_agrees_with_the_maker_bit_for_bit_and_encode_gives_its_bytes(case):
    """Fed float32 scales, its values are exact; its own answer in bfloat16 is one rounding of ours."""
    document = read(case)
    scheme = scheme_of(document)
    tensors = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, case)
    weight = scheme.decode(tensors, shape, case)
    assert torch.equal(weight.dequantize(), tensor(document["dequantized"]))
    native = tensor(document["native"])
    if scheme.symmetric:
        assert torch.equal(weight.dequantize(native.dtype), native)
    encoded = scheme.encode(weight, scheme.decode_activation(tensors, case))
    assert encoded.keys() == tensors.keys()
    for suffix, stored in tensors.items():
        assert (encoded[suffix].dtype, encoded[suffix].shape) == (stored.dtype, stored.shape)
        assert torch.equal(encoded[suffix], stored), suffix


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ct-")])
def test_quantizing_chooses_the_makers_scales_and_codes_no_worse(case):
    """
    From the same dense layer: the same scales, up to how a bfloat16 quotient is rounded, and codes whose squared error
    is at most the maker's, who divides in bfloat16.
    """
    document = read(case)
    scheme = scheme_of(document)
    dense = tensor(document["dense"])
    weight = scheme.quantize(dense)
    stored = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    ours, theirs = weight.scales.float().reshape(-1), stored["weight_scale"].float().reshape(-1)
    # Two roundings (the quotient here, range and quotient there) of a number: at most two units of 2^-8 apart.
    assert bool(((ours - theirs).abs() <= theirs * 2 * 2.0**-8).all())
    error = (weight.dequantize().double() - dense.double()).square().sum()
    other = (tensor(document["dequantized"]).double() - dense.double()).square().sum()
    assert error <= other


def test_a_static_activation_of_a_real_checkpoint():
    """The zero point -28 is 100 in unsigned codes."""
    document = read("smollm2-w8a8-static-asym")
    tensors = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    found = scheme_of(document).decode_activation(tensors, "layer")
    assert int(found.zero) == int(tensors["input_zero_point"]) + 128
    assert found.scale == tensors["input_scale"].float()[0]
