"""
Cut the golden files from checkpoints that llm-compressor wrote and compressed-tensors decoded.

    python extract_ct.py WITNESS OUT

WITNESS is what `tests/witness/make_compressed_tensors.py` leaves (its page says how to run it). OUT/<case>.json then
holds the configuration as written, dtype and shape of every tensor of one decoder layer and of the head, and a corner
(32 rows, 128 inputs) of a layer or two: tensors as written, except that `weight_shape` tells the size of the corner;
the first row of the tool's own dequantized values in float32; and the SHA-256 of the whole corner of them. Corners lie
on whole groups and words, and on one block. A tensor is `{"dtype", "shape", "data"}`, the data in base64, little-endian
and row-major.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

BLOCK = "model.layers.1."
ATTENTION, MLP = f"{BLOCK}self_attn.k_proj", f"{BLOCK}mlp.down_proj"
TWO = ("ct-mixed-fp8attn-w4a16mlp", "ct-two-groups-prefix")
"""Cases whose layers differ."""
N, K = 32, 128
TOOL = {"tool": "llmcompressor", "version": "0.14.0.1", "compressed-tensors": "0.20.0", "torch": "2.13.0"}


def spelled(tensor: torch.Tensor) -> dict[str, Any]:
    """Return a tensor as JSON."""
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def corner(suffix: str, tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Return what belongs to the first rows and inputs of a layer of that size."""
    if suffix == "weight_shape":
        return torch.tensor([N, K])
    if tensor.dim() < 2:
        return tensor
    rows, columns = (max(1, s * cut // full) for s, cut, full in zip(tensor.shape, (N, K), size, strict=True))
    return tensor[:rows, :columns]


def main() -> None:
    """Write every case."""
    witness, out = map(Path, sys.argv[1:])
    for source in sorted((witness / "ckpt").glob("ct-*")):
        with safe_open(source / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        layers = {}
        with safe_open(witness / "decompressed" / f"{source.name}.safetensors", "pt") as file:
            for path in (ATTENTION, MLP) if source.name in TWO else (ATTENTION,):
                values = file.get_tensor(f"{path}.weight")
                part = values.float()[:N, :K].contiguous()
                own = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == path}
                layers[path] = {
                    "tensors": {s: spelled(corner(s, t, tuple(values.shape))) for s, t in sorted(own.items())},
                    "first_row": part[0].tolist(),
                    "sha256": hashlib.sha256(part.numpy().tobytes()).hexdigest(),
                }
        document = {
            "maker": {
                **TOOL,
                "command": f"python tests/witness/make_compressed_tensors.py DENSE OUT TEXT {source.name}",
            },
            "config": json.loads((source / "config.json").read_text())["quantization_config"],
            "stored": {
                name: [str(t.dtype).removeprefix("torch."), list(t.shape)]
                for name, t in sorted(tensors.items())
                if name.startswith((BLOCK, "lm_head"))
            },
            "layers": layers,
        }
        path = out / f"{source.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
