"""
Experts that third-party tools wrote (golden/, cut by cut_experts.py) decode to what those decode them to, to the bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.policy import Policy

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
REFERENCE = Policy.parse({"rule": [{"pin": "loop.reference"}]}, "test")
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def stored(spelled):
    dtype = DTYPES[spelled["dtype"]]
    if "data" not in spelled:
        return torch.zeros(spelled["shape"], dtype=dtype)
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(spelled["shape"])


def digest(values):
    return hashlib.sha256((values.to(torch.float32) + 0.0).contiguous().numpy().tobytes()).hexdigest()


def values_of(module):
    return [[digest(values) for values in module.dequantize(expert)] for expert in range(module.problem.experts)]


@pytest.mark.filterwarnings("ignore:.*reference kernel")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_experts_decode_to_what_their_tool_decodes_them_to(path, tmp_path):
    golden = json.loads(path.read_text())
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    tensors = {name: stored(spelled) for name, spelled in golden["tensors"].items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    experts = load_layers(plan(tmp_path, dtype="float32", policy=REFERENCE), tmp_path).experts

    assert {path: values_of(module) for path, module in experts.items()} == golden["decoded"]
