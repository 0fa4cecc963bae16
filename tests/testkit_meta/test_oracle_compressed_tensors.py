"""The oracle of pack-quantized against its own page and layers that the format's own tool wrote."""

from __future__ import annotations

import base64
import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from quantplug_testkit.oracles import compressed_tensors as oracle

GOLDEN = Path(__file__).parents[1] / "plugins" / "compressed-tensors" / "golden"


def test_the_worked_examples_hold():
    """What the module's docstring shows is what it does."""
    assert doctest.testmod(oracle).failed == 0


@pytest.mark.parametrize(
    "case", ["uneven-w2", "uneven-w3", "uneven-w4", "uneven-w8", "g-idx-w4-order", "g-idx-w8-order"]
)
def test_it_reads_what_the_tool_wrote(case):
    """Values in float64, rounded once, are the tool's float32."""
    document = json.loads((GOLDEN / f"{case}.json").read_text())
    arrays = {name: array(spelled) for name, spelled in document["tensors"].items()}
    values = array(document["dequantized"])
    found = oracle.dequantize(
        arrays["weight_packed"],
        arrays["weight_scale"],
        arrays.get("weight_zero_point"),
        arrays.get("weight_g_idx"),
        bits=document["weights"]["num_bits"],
        count=values.shape[1],
        group_size=document["weights"].get("group_size", values.shape[1]),
    )
    assert np.array_equal(found.astype(np.float32), values)


def array(spelled: dict) -> np.ndarray:
    data = base64.b64decode(spelled["data"])
    return np.frombuffer(data, dtype=spelled["dtype"]).reshape(spelled["shape"])
