"""
The worked examples of SPEC.md, executed in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fp8_files import float8, octets

from quantplug.spec import LinearShape
from quantplug_fp8.scheme import FP8Scheme

SPEC = Path(__file__).parents[3] / "plugins" / "fp8" / "SPEC.md"
TEXT = SPEC.read_text()
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


def test_there_are_examples():
    """A block cut off, rows, a tensor with a scale of x, rows that are divided."""
    assert [block["params"]["strategy"] for block in BLOCKS] == ["block", "channel", "tensor", "channel"]
    assert BLOCKS[-1]["params"]["inverse"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["params"]["strategy"])
def test_an_example_means_what_the_page_says(block):
    """Values as printed, signs of zeros included, and the same bytes on the way back."""
    scheme = FP8Scheme.build(block["params"], "SPEC.md")
    codes = np.array([list(bytes.fromhex(row)) for row in block["weight"]], np.uint8)
    tensors = {"weight": float8(codes, block["params"].get("element", "float8_e4m3fn"))}
    tensors |= {name: torch.tensor(scales) for name, scales in block["scales"].items()}
    values = torch.tensor(block["values"])
    assert scheme.shape_of({name: tuple(t.shape) for name, t in tensors.items()}, "example") == LinearShape(
        *values.shape
    )
    weight = scheme.decode(tensors, LinearShape(*values.shape), "example")
    assert torch.equal(weight.dequantize(), values)
    assert torch.equal(weight.dequantize().signbit(), values.signbit())
    encoded = scheme.encode(weight, scheme.decode_activation(tensors, "example"))
    assert encoded.keys() == tensors.keys()
    assert np.array_equal(octets(encoded.pop("weight")), codes)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoded.items())


def test_the_byte_that_the_page_explains():
    """Row 1, input 3 of the first example, by hand."""
    block = BLOCKS[0]
    code = int(block["weight"][1].split()[3], 16)
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    assert (code, sign, exponent, fraction) == (0xFE, 1, 15, 6)
    assert block["values"][1][3] == -(1 + 6 / 8) * 2 ** (15 - 7) * block["scales"]["weight_scale_inv"][0][1]


@pytest.mark.parametrize("element", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_the_table_of_elements(element):
    """Largest number and special bytes as the page has them."""
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{element}` | "))
    _, _, _, largest, nan, infinite, _ = (cell.strip() for cell in row.split("|"))
    values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, element)).float()
    assert float(values[values.isfinite()].max()) == float(largest)
    assert values.isnan().nonzero().flatten().tolist() == spelled(nan)
    assert values.isinf().nonzero().flatten().tolist() == spelled(infinite)


def spelled(cell: str) -> list[int]:
    if cell == "none":
        return []
    ends = [[int(end, 16) for end in part.split(" to ")] for part in cell.split(", ")]
    return [byte for first, *last in ends for byte in range(first, (last or [first])[0] + 1)]
