"""
Cut the golden files from checkpoints that llm-compressor wrote and compressed-tensors decoded.

    python extract.py WITNESS OUT

WITNESS is what `tests/witness/make_compressed_tensors.py` leaves (its page says how to run it):

    python tests/witness/make_compressed_tensors.py .cache/demo/smollm2-135m-bf16 WITNESS \
        examples/demo/calibration.txt \
        ct-mxfp8 ct-mxfp8a16 ct-mxfp4 ct-mxfp4a16 ct-nvfp4 ct-nvfp4a16

OUT/<case>.json then holds the first eight rows of one layer: its tensors as written, the tool's own dequantized values
(for NVFP4 in float32, for the others in bfloat16, which holds them exactly), the dense rows it was made from, and the
configuration as written. A tensor is `{"dtype", "shape", "data"}`, the data in base64, little-endian and row-major.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

CASES = ("ct-mxfp8", "ct-mxfp8a16", "ct-mxfp4", "ct-mxfp4a16", "ct-nvfp4", "ct-nvfp4a16")
LAYER = "model.layers.1.self_attn.k_proj"
ROWS = 8
TOOL = {"tool": "llmcompressor", "version": "0.14.0.1", "compressed-tensors": "0.20.0", "torch": "2.13.0"}


def spelled(tensor: torch.Tensor) -> dict[str, Any]:
    """Return a tensor as JSON."""
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(bytes(octets.tolist())).decode()}


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the first rows of a matrix, anything else whole."""
    return tensor[:ROWS] if tensor.dim() > 1 else tensor


def main() -> None:
    """Write every case."""
    witness, out = map(Path, sys.argv[1:])
    with safe_open(witness / "ckpt" / "dense" / "model.safetensors", "pt") as file:
        dense = file.get_tensor(f"{LAYER}.weight")
    for case in CASES:
        source = witness / "ckpt" / case
        with safe_open(source / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.rpartition(".")[0] == LAYER]  # noqa: SIM118 - not a mapping
            tensors = {name.rpartition(".")[2]: spelled(rows(file.get_tensor(name))) for name in sorted(names)}
        with safe_open(witness / "decompressed" / f"{case}.safetensors", "pt") as file:
            values = file.get_tensor(f"{LAYER}.weight")
        document = {
            "maker": {**TOOL, "command": f"python tests/witness/make_compressed_tensors.py DENSE OUT TEXT {case}"},
            "config": json.loads((source / "config.json").read_text())["quantization_config"],
            "layer": LAYER,
            "tensors": tensors,
            "dequantized": spelled(rows(values if "nvfp4" in case else values.to(torch.bfloat16))),
            "dense": spelled(rows(dense)),
        }
        (out / f"{case}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
