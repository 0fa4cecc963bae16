"""
Cut the first rows of one layer out of checkpoints that Transformers wrote from SmolLM2-135M-Instruct with torchao.

    python cut_torchao.py OUT WITNESS

WITNESS is the directory that tests/witness/make_transformers.py filled, in the environment it names. OUT/smollm2.json
then holds, for each checkpoint: its configuration, what `__metadata__` says about the layer, names, dtypes and shapes
of its tensors, those tensors for the first rows, and what torchao dequantizes them to.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

NAMES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
CASES = ("ao-int8wo", "ao-int8wo-g64", "ao-int8dyn", "ao-int4wo-intx-g32", "ao-int8dyn-int4-g32", "ao-float8wo")
LAYER, ROWS = "model.layers.1.self_attn.k_proj", 4


def spell(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(zlib.compress(data, 9)).decode(),
    }


def main(out: Path, witness: Path) -> None:
    """Write the file."""
    cases = {}
    for case in CASES:
        checkpoint = witness / "ckpt" / case
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{LAYER}.")]  # noqa: SIM118 - not a mapping
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = {key: text for key, text in file.metadata().items() if key.startswith(f"{LAYER}.")}
        with safe_open(witness / "decompressed" / f"{case}.safetensors", "pt") as file:
            values = file.get_tensor(f"{LAYER}.weight")
        config = json.loads((checkpoint / "config.json").read_text())
        cases[case] = {
            "quantization_config": config["quantization_config"],
            "stored": {name: [NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()},
            "metadata": metadata,
            "tensors": {name: spell(tensor[:ROWS]) for name, tensor in tensors.items()},
            "dequantized": spell(values[:ROWS]),
        }
    command = "python tests/witness/make_transformers.py .cache/demo/smollm2-135m-bf16 WITNESS " + " ".join(CASES)
    document = {
        "maker": {
            "tool": "transformers 5.23.0 with torchao 0.18.0",
            "command": f"{command}, then python cut_torchao.py OUT WITNESS",
        },
        "cases": cases,
    }
    (out / "smollm2.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
