"""
The worked examples of SPEC.md, executed: packed layers in both directions, the q4_0 block, and the priority of targets.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from ct_files import build, parse

from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.spec import LinearShape

SPEC = Path(__file__).parents[3] / "plugins" / "compressed-tensors" / "SPEC.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPEC.read_text(), re.DOTALL)]
LAYERS = [block for block in BLOCKS if "params" in block]


def stored(value: list) -> torch.Tensor:
    """Return hexadecimal words as int32, one small integer as int8, other numbers as bfloat16."""
    if isinstance(value[0], list) and isinstance(value[0][0], str):
        signed = [[int.from_bytes(bytes.fromhex(word), "big", signed=True) for word in row] for row in value]
        return torch.tensor(signed, dtype=torch.int32)
    return torch.tensor(value, dtype=torch.int8 if isinstance(value[0], int) else torch.bfloat16)


def test_there_are_examples():
    assert (len(BLOCKS), len(LAYERS)) == (5, 3)


@pytest.mark.parametrize("block", LAYERS)
def test_a_layer_means_what_the_page_says(block):
    """Values and zero points as printed, and the same tensors on the way back."""
    scheme = build(**block["params"])
    values = torch.tensor(block["values"])
    tensors = {name: stored(block[name]) for name in scheme.suffixes & block.keys() - {"weight_g_idx"}}
    tensors["weight_shape"] = torch.tensor(values.shape)
    if "weight_g_idx" in block:
        tensors["weight_g_idx"] = torch.tensor(block["weight_g_idx"], dtype=torch.int32)
    weight = scheme.decode(tensors, LinearShape(*values.shape), "example")
    assert torch.equal(weight.dequantize(), values)
    if weight.zeros is not None:
        assert weight.zeros.tolist() == block["zeros"]
    again = scheme.encode(weight)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())


def test_the_word_that_the_page_explains():
    """Row 0, input 1 of the first layer, by hand."""
    block = LAYERS[0]
    code, zero = int(block["weight_packed"][0][0], 16) >> 4 & 15, int(block["weight_zero_point"][0][0], 16) & 15
    assert (code, zero, block["weight_g_idx"][1], block["weight_scale"][0][0]) == (2, 0, 0, 2.0)
    assert block["values"][0][1] == (code - zero) * 2.0


def test_the_block_of_the_grid_keeps_its_bits():
    """Codes and scale as printed; the largest weight over -8 would give another fourth weight."""
    (block,) = (block for block in BLOCKS if "grid" in block)
    dense = torch.tensor([block["dense"]]).bfloat16()
    weight = build(bits=4, group_size=32, grid=block["grid"]).quantize(dense)
    assert (weight.codes.tolist(), weight.scales.tolist()) == ([block["codes"]], [[block["scale"]]])
    assert torch.equal(weight.dequantize(torch.bfloat16), dense)
    guess = min(block["dense"]) / -8
    assert guess == 0.00106048583984375
    products = (torch.tensor(block["codes"], dtype=torch.float32) * guess).bfloat16()
    assert float(products[3]) == -0.00531005859375
    assert (products != dense[0]).nonzero().tolist() == [[3]]


def test_targets_decide_as_the_page_says():
    """By the size of the groups that each layer gets."""
    (block,) = (block for block in BLOCKS if "layers" in block)
    layers = block.pop("layers")
    config = parse(block)
    matcher = Matcher(config.rules, config.default)
    for path, size in layers.items():
        use = matcher.decide(ModuleInfo(path, "linear", class_name="Linear")).use
        assert (None if use is None else dict(use.params)["group_size"]) == size, path
