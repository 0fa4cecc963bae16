"""
The worked examples of SPEC.md, executed in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from quantplug.spec import LinearShape
from quantplug_gptq.scheme import GPTQScheme

SPEC = Path(__file__).parents[3] / "plugins" / "gptq" / "SPEC.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC.read_text(), re.DOTALL)]
STORED_AS = {
    "gptq, by field": {"checkpoint_format": "gptq"},
    "gptq, by word": {"checkpoint_format": "gptq", "zeros_offset": "word"},
    "gptq_v2": {"checkpoint_format": "gptq_v2"},
}
CASES = [(number, words) for number, block in enumerate(BLOCKS) for words in block["qzeros"]]


def words(rows: list[list[str]]) -> torch.Tensor:
    signed = [[int.from_bytes(bytes.fromhex(word), "big", signed=True) for word in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32)


def test_there_are_examples():
    """Five ways of storing two layers."""
    assert len(CASES) == 5


@pytest.mark.parametrize(("number", "stored_as"), CASES)
def test_an_example_means_what_the_page_says(number, stored_as):
    """Values as printed, zero points as printed, and the same words on the way back."""
    block = BLOCKS[number]
    scheme = GPTQScheme.build({**block["params"], **STORED_AS[stored_as]}, "SPEC.md")
    tensors = {
        "qweight": words(block["qweight"]),
        "qzeros": words(block["qzeros"][stored_as]),
        "scales": torch.tensor(block["scales"], dtype=torch.float16),
        "g_idx": torch.tensor(block["g_idx"], dtype=torch.int32),
    }
    values = torch.tensor(block["values"])
    weight = scheme.decode(tensors, LinearShape(*values.shape), "example")
    assert torch.equal(weight.dequantize(), values)
    if weight.zeros is not None:
        assert weight.zeros.t().tolist() == block["zeros"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in scheme.encode(weight).items())


def test_the_word_that_the_page_explains():
    """Row 0, input 1 of the first example, by hand."""
    block = BLOCKS[0]
    code = int(block["qweight"][0][0], 16) >> 4 & 15
    assert (code, block["g_idx"][1], block["zeros"][0][0], block["scales"][0][0]) == (11, 0, 8, 0.5)
    assert block["values"][0][1] == (code - 8) * 0.5
