"""
The worked examples of SPEC.md, executed in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from int8_files import build

from quantplug.spec import LinearShape

SPEC = Path(__file__).parents[3] / "plugins" / "int8" / "SPEC.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC.read_text(), re.DOTALL)]
DTYPES = {
    "weight": torch.int8,
    "weight_scale": torch.bfloat16,
    "weight_scale_inv": torch.float32,
    "weight_zero_point": torch.int8,
    "input_scale": torch.bfloat16,
    "input_zero_point": torch.int8,
}


def test_there_are_examples():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_means_what_the_page_says(block):
    """Values, codes and zero points as printed, and the same tensors on the way back."""
    scheme = build(**block["params"])
    tensors = {name: torch.tensor(block[name], dtype=dtype) for name, dtype in DTYPES.items() if name in block}
    values = torch.tensor(block["values"])
    weight = scheme.decode(tensors, LinearShape(*values.shape), "example")
    assert torch.equal(weight.dequantize(), values.float())
    assert weight.codes.tolist() == block.get("codes", block["weight"])
    if weight.zeros is not None:
        assert weight.zeros.tolist() == block["zeros"]
    activation = scheme.decode_activation(tensors, "example")
    if activation is not None:
        assert int(activation.zero) == block["zero_of_x"]
    stored = scheme.encode(weight, activation)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.items())
