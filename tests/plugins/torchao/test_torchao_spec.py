"""
The worked examples of SPEC.md, executed in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torchao_files import build

from quantplug.spec import LinearShape

SPEC = Path(__file__).parents[3] / "plugins" / "torchao" / "SPEC.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC.read_text(), re.DOTALL)]
DTYPES = {"_weight_qdata": torch.int8, "_weight_scale": torch.bfloat16, "_weight_zero_point": torch.int8}


def test_there_are_examples():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_means_what_the_page_says(block):
    """Values, codes and zero points as printed, and the same tensors on the way back."""
    scheme = build(**block["params"])
    tensors = {name: torch.tensor(block[name], dtype=dtype) for name, dtype in DTYPES.items()}
    values = torch.tensor(block["values"], dtype=torch.float32)
    weight = scheme.decode(tensors, LinearShape(*values.shape), "example")
    assert torch.equal(weight.dequantize(), values)
    assert weight.codes.tolist() == block["codes"]
    assert (weight.zeros is None) == ("zeros" not in block)
    if weight.zeros is not None:
        assert weight.zeros.tolist() == block["zeros"]
    stored = scheme.encode(weight)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.items())
