"""
The worked examples of SPEC.md, executed in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from awq_files import build

from quantplug.spec import LinearShape

SPEC = Path(__file__).parents[3] / "plugins" / "awq" / "SPEC.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC.read_text(), re.DOTALL)]


def words(rows: list[list[str]]) -> torch.Tensor:
    signed = [[int.from_bytes(bytes.fromhex(word), "big", signed=True) for word in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32)


def test_there_are_examples():
    """One for each layout."""
    assert [block["params"].get("version", "gemm") for block in BLOCKS] == ["gemm", "gemv"]


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_means_what_the_page_says(block):
    """Values as printed, zero points as printed, and the same words on the way back."""
    scheme = build(**block["params"])
    tensors = {
        "qweight": words(block["qweight"]),
        "qzeros": words(block["qzeros"]),
        "scales": torch.tensor(block["scales"], dtype=torch.float16),
    }
    shape = scheme.shape_of({suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}, "example")
    values = torch.tensor(block["values"])
    weight = scheme.decode(tensors, shape, "example")
    assert torch.equal(weight.dequantize(), values.repeat(1, shape.in_features // values.shape[1]))
    assert weight.zeros.tolist() == block["zeros"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in scheme.encode(weight).items())
    assert shape == LinearShape(len(block["values"]), weight.in_features)


def test_the_word_that_the_page_explains():
    """Row 1, input 0 of the first example, by hand."""
    block = BLOCKS[0]
    code, zero = (int(block[name][0][0], 16) >> 16 & 15 for name in ("qweight", "qzeros"))
    assert (code, zero, block["scales"][0][1]) == (7, 10, 1)
    assert block["values"][1][0] == code - zero
