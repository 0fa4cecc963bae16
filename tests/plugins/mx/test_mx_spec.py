"""
The worked examples of SPEC.md, executed in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from mx_files import build, numbers, same_bits

from quantplug.spec import LinearShape

SPEC = Path(__file__).parents[3] / "plugins" / "mx" / "SPEC.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC.read_text(), re.DOTALL)]
GLOBALS = ("weight_global_scale", "weight_scale_2")
CASES = [(number, name) for number, block in enumerate(BLOCKS) for name in (*GLOBALS, "") if name in (*block, "")]
CASES = [(number, name) for number, name in CASES if bool(name) == (BLOCKS[number]["scheme"] == "nvfp4")]
DTYPES = {
    ("mxfp8", "weight"): torch.float8_e4m3fn,
    ("nvfp4", "weight_scale"): torch.float8_e4m3fn,
}


def rows(spelled: list[str]) -> torch.Tensor:
    return torch.tensor([list(bytes.fromhex(row)) for row in spelled], dtype=torch.uint8)


def test_there_are_examples():
    """Each MX format once, NVFP4 in both spellings and with a divisor that is no power of two."""
    assert [(BLOCKS[number]["scheme"], name) for number, name in CASES] == [
        ("mxfp8", ""), ("mxfp4", ""), ("nvfp4", GLOBALS[0]), ("nvfp4", GLOBALS[1]), ("nvfp4", GLOBALS[0]),
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "global_name"), CASES)
def test_an_example_means_what_the_page_says(number, global_name):
    """Values as printed, signs of zeros included, and the same bytes on the way back."""
    block = BLOCKS[number]
    scheme = build(block["scheme"], **({"global_name": global_name} if global_name else {}))
    tensors = {
        suffix: rows(spelled).view(DTYPES.get((block["scheme"], suffix), torch.uint8))
        for suffix, spelled in block.items()
        if suffix.startswith("weight") and suffix not in GLOBALS
    }
    if global_name:
        tensors[global_name] = numbers(global_name, block[global_name])
    values = torch.tensor(block["values"])
    weight = scheme.decode(tensors, LinearShape(*values.shape), "example")
    assert same_bits(weight.dequantize(), values)
    encoded = scheme.encode(weight)
    assert encoded.keys() == tensors.keys()
    assert all(same_bits(tensor, tensors[suffix]) for suffix, tensor in encoded.items())
