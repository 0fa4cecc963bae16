"""
Layers that llm-compressor wrote, with the values that compressed-tensors itself reads from them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mx_files import GOLDEN, NV_ACTIVATION, build, golden, same_bits

from quantplug.spec import LinearShape
from quantplug_testkit.oracles import mx as oracle

CASES = {
    "ct-mxfp8": ("mxfp8", {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}),
    "ct-mxfp8a16": ("mxfp8", {}),
    "ct-mxfp4": ("mxfp4", {"activation": "float4_e2m1fn/group32/dynamic/float8_e8m0fnu"}),
    "ct-mxfp4a16": ("mxfp4", {}),
    "ct-nvfp4": ("nvfp4", {"activation": NV_ACTIVATION}),
    "ct-nvfp4a16": ("nvfp4", {}),
}


def test_the_cases_are_all_there():
    """All three formats, x left alone and quantized."""
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_decode_agrees_with_compressed_tensors_bit_for_bit_and_encode_gives_its_bytes(case):
    """Values in float32, signs of zeros included; then every stored tensor again, in its dtype and shape."""
    name, params = CASES[case]
    document, scheme = golden(case), build(name, **params)
    tensors = document["tensors"]
    shape = scheme.shape_of({suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}, case)
    assert shape == LinearShape(8, 576)
    weight = scheme.decode(tensors, shape, case)
    assert same_bits(weight.dequantize(), document["dequantized"].to(torch.float32))
    encoded = scheme.encode(weight, scheme.decode_activation(tensors, case))
    assert encoded.keys() == tensors.keys()
    assert all(same_bits(encoded[suffix], tensor) for suffix, tensor in tensors.items())


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_agrees_with_compressed_tensors(case):
    """What the other tests compare with is what a third party reads, too."""
    document = golden(case)
    stored = {suffix: tensor.contiguous().view(torch.uint8).numpy() for suffix, tensor in document["tensors"].items()}
    if "mxfp8" in case:
        values = oracle.mxfp8(stored["weight"], stored["weight_scale"])
    elif "mxfp4" in case:
        values = oracle.mxfp4(stored["weight_packed"], stored["weight_scale"])
    else:
        divisor = document["tensors"]["weight_global_scale"].item()
        values = oracle.nvfp4(stored["weight_packed"], stored["weight_scale"], divide_by=divisor)
    assert np.array_equal(values, document["dequantized"].double().numpy())


def test_the_factor_of_the_scales_of_x_is_the_stored_numbers_reciprocal():
    """compressed-tensors divides by `input_global_scale`, as by that of the weight."""
    document = golden("ct-nvfp4")
    activation = build("nvfp4", activation=NV_ACTIVATION).decode_activation(document["tensors"], "layer")
    assert activation.global_scale.item() == 1 / document["tensors"]["input_global_scale"].item()
