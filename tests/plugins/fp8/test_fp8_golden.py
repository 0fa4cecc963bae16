"""
Rows of files that other tools wrote: their own bytes, their own dequantized weights.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from quantplug.config import RawConfig
from quantplug_fp8.dialect import FP8Dialect
from quantplug_fp8.scheme import FP8Scheme

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
BLOCKS = {"strategy": "block", "block_n": 128, "block_k": 128}
STATIC = "float8_e4m3fn/tensor/static"
# What another format's configuration says, in the words of this scheme; its own dialect is that plugin's.
OTHERS = {
    "ct-fp8-dynamic": {"strategy": "channel", "activation": "float8_e4m3fn/token/dynamic"},
    "ct-fp8-weightonly": {"strategy": "channel"},
    "ct-fp8-static": {"strategy": "tensor", "activation": STATIC},
    "ct-fp8-block": {**BLOCKS, "activation": "float8_e4m3fn/group128/dynamic"},
    "ar-autoround-fp8-static": {"strategy": "channel", "activation": STATIC},
}
OWN = {
    "hf-fp8-block64": "fp8 e4m3fn block 64x64, x float8_e4m3fn group 64, dynamic",
    "hf-fp8-block128-ue8m0": "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic",
    "hf-fp8-tensor": "fp8 e4m3fn per tensor, x float8_e4m3fn per token, dynamic",
    "ar-fp8-block": "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic",
}
DIVIDED = {
    "gq-fp8-row": "fp8 e4m3fn per channel, scales divide, x float8_e4m3fn per token, dynamic",
    "gq-fp8-block128": "fp8 e4m3fn block 128x128, scales divide",
}


def tensor(spelled: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=DTYPES[spelled["dtype"]]).view(spelled["shape"])


def read(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def scheme_of(case: str, document: dict) -> FP8Scheme:
    if case in OTHERS:
        return FP8Scheme.build(OTHERS[case], case)
    section = document["quantization_config"]
    config = FP8Dialect().parse(RawConfig(section["quant_method"], section, {}, {}, "config.json: quantization_config"))
    use = config.default or next(rule.use for rule in config.rules if rule.use is not None)
    assert (use.name, config.notes) == ("fp8", ())
    return FP8Scheme.build(dict(use.params), case)


def test_the_cases_are_all_there():
    """Per tensor, row and block, BF16, FP32 and power-of-two scales, both spellings, static and dynamic."""
    assert {path.stem for path in GOLDEN.glob("*.json")} == OTHERS.keys() | OWN.keys() | DIVIDED.keys()


@pytest.mark.parametrize("case", [*OTHERS, *OWN])
def test_decode_agrees_with_the_tool_bit_for_bit_and_encode_gives_its_bytes(case):
    """Its values in the dtype it gives them; scales in the dtype it stored them."""
    document = read(case)
    scheme = scheme_of(case, document)
    assert scheme.describe() == OWN.get(case, scheme.describe())
    tensors = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    values = tensor(document["values"])
    shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, document["layer"])
    weight = scheme.decode(tensors, shape, document["layer"])
    assert torch.equal(weight.dequantize(values.dtype), values)
    encoded = scheme.encode(weight, scheme.decode_activation(tensors, document["layer"]))
    assert torch.equal(encoded["weight"].view(torch.uint8), tensors["weight"].view(torch.uint8))
    for suffix in tensors.keys() - {"weight"}:
        assert torch.equal(encoded[suffix].float().flatten(), tensors[suffix].float().flatten()), suffix
        assert suffix == "input_scale" or encoded[suffix].dtype == tensors[suffix].dtype


@pytest.mark.parametrize("case", DIVIDED)
def test_divided_values_are_the_tools_within_one_rounding_of_the_scale_and_encode_gives_its_bytes(case):
    """
    In float64 the reciprocals give the tool's values to the bit; the float32 that multiplies is one rounding away.
    """
    document = read(case)
    scheme = scheme_of(case, document)
    assert scheme.describe() == DIVIDED[case]
    tensors = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    theirs = tensor(document["values"])
    shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, document["layer"])
    weight = scheme.decode(tensors, shape, document["layer"])
    scales = weight.scales if "row" in case else weight.scales.repeat_interleave(128, 1)[:, : shape.in_features]
    assert torch.equal((tensors["weight"].double() * scales).float(), theirs)
    ours = weight.dequantize()
    apart = (ours.view(torch.int32) - theirs.view(torch.int32)).abs()
    assert int(apart.max()) == 1
    assert torch.equal(ours.signbit(), theirs.signbit())
    encoded = scheme.encode(weight)
    assert torch.equal(encoded["weight"].view(torch.uint8), tensors["weight"].view(torch.uint8))
    stored = tensors["weight_scale_inv"]
    assert encoded["weight_scale_inv"].dtype == stored.dtype
    assert torch.equal(encoded["weight_scale_inv"].flatten(), stored.flatten())


def test_what_the_witnesses_are_there_for():
    """Blocks cut off along both axes, 1-D row scales, a scale of x, scales of one byte."""
    assert tensor(read("ct-fp8-block")["tensors"]["weight_scale"]).shape == (1, 5)
    assert tensor(read("ar-autoround-fp8-static")["tensors"]["weight_scale"]).shape == (4,)
    assert tensor(read("hf-fp8-tensor")["tensors"]["weight_scale_inv"]).shape == (1, 1)
    assert "input_scale" in read("ct-fp8-static")["tensors"]
    assert tensor(read("hf-fp8-block128-ue8m0")["tensors"]["weight_scale_inv"]).dtype == torch.float8_e8m0fnu
