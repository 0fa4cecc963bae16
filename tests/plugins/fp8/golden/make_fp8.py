"""
Extract the golden rows from whole checkpoints that tests/witness makes, in seconds.

    python make_fp8.py WITNESS OUT [case ...]

WITNESS has the checkpoints of SmolLM2-135M-Instruct that llm-compressor 0.14 with compressed-tensors 0.20 (`ct-…`),
Transformers (`hf-…`), auto-round 0.16.1 (`ar-…`) and GPTQModel 7.7 (`gq-…`) wrote, in `ckpt/<case>`, and the weights
as each tool itself dequantizes them in `decompressed/<case>.safetensors`. OUT/<case>.json then holds, for `ROWS` rows
of one layer, the stored tensors, the tool's own values, and the configuration as written. Rows are those of the last
block, which is cut off where the layer is; with them go the scales that belong to them, so that an extract is a layer
of its own.
A tensor is `{"dtype", "shape", "data"}`, the data in base64, little-endian and row-major.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

LAYER = "model.layers.0.self_attn.k_proj"
ROWS = 4
NAMES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip
# case -> rows of a block, where scales are per block
CASES = {
    "ct-fp8-dynamic": None,
    "ct-fp8-weightonly": None,
    "ct-fp8-static": None,
    "ct-fp8-block": 128,
    "hf-fp8-block64": 64,
    "hf-fp8-block128-ue8m0": 128,
    "hf-fp8-tensor": None,
    "ar-fp8-block": 128,
    "ar-autoround-fp8-static": None,
    "gq-fp8-row": None,
    "gq-fp8-block128": 128,
}


def spelled(tensor: torch.Tensor) -> dict[str, object]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data": base64.b64encode(data).decode(),
    }  # fmt: skip


def extract(witness: Path, case: str, block: int | None) -> dict[str, object]:
    directory = witness / "ckpt" / case
    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                path, _, suffix = name.rpartition(".")
                if path == LAYER:
                    stored[suffix] = tensors.get_tensor(name)
    with safe_open(witness / "decompressed" / f"{case}.safetensors", "pt") as tensors:
        values = tensors.get_tensor(f"{LAYER}.weight")
    rows = stored["weight"].shape[0]
    first = (rows - 1) // block * block if block else rows - ROWS
    kept = {}
    for suffix, tensor in stored.items():
        if tensor.numel() == 1:
            kept[suffix] = tensor
        elif tensor.shape[0] == rows:
            kept[suffix] = tensor[first : first + ROWS]
        else:
            kept[suffix] = tensor[first // (block or 1) :]
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    return {
        "quantization_config": section,
        "layer": LAYER,
        "rows": [first, first + ROWS],
        "tensors": {suffix: spelled(tensor) for suffix, tensor in kept.items()},
        "values": spelled(values[first : first + ROWS]),
    }


if __name__ == "__main__":
    source, target, *wanted = sys.argv[1:]
    for name in wanted or CASES:
        document = extract(Path(source), name, CASES[name])
        (Path(target) / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
