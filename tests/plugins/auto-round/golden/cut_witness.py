"""
Cut the first rows of one layer out of checkpoints that auto-round wrote from SmolLM2-135M-Instruct.

    python cut_witness.py OUT WITNESS

WITNESS is the directory that tests/witness/make_auto_round.py filled, in the environment it names. OUT/smollm2-*.json
then holds the configuration as written (and auto-round's own file beside it), every tensor's name, dtype and shape, the
stored tensors of the rows, and what auto-round's own layer multiplies with, or null where it cannot load its file.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

NAMES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip
CASES = (
    "ar-autoround-fp8-block", "ar-autoround-fp8-static", "ar-autoround-fpw8a16", "ar-autoround-mxfp4",
    "ar-autoround-mxfp8", "ar-autoround-nvfp4",
)  # fmt: skip
LAYER, ROWS, BLOCK = "model.layers.1.self_attn.k_proj", 4, 128


def spell(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def cut(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Keep what belongs to the first rows: of a tensor with one entry per row, or per block of rows."""
    if tensor.dim() and tensor.shape[0] == rows:
        return tensor[:ROWS]
    return tensor[:1] if tensor.dim() == 2 and tensor.shape[0] == -(-rows // BLOCK) else tensor


def main(out: Path, witness: Path) -> None:
    """Write one file per case."""
    for case in CASES:
        checkpoint, decoded = witness / "ckpt" / case, witness / "decompressed" / f"{case}.safetensors"
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        stored = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == LAYER}
        rows = next(stored[suffix] for suffix in ("weight", "weight_packed") if suffix in stored).shape[0]
        values = None
        if decoded.exists():
            with safe_open(decoded, "pt") as file:
                values = spell(file.get_tensor(f"{LAYER}.weight")[:ROWS])
        document = {
            "maker": {
                "tool": "auto-round",
                "version": "0.16.1",
                "command": f"python tests/witness/make_auto_round.py .cache/demo/smollm2-135m-bf16 WITNESS "
                f"examples/demo/calibration.txt {case}, then python cut_witness.py OUT WITNESS",
            },
            "config": {
                "quantization_config": json.loads((checkpoint / "config.json").read_text())["quantization_config"],
                "quantization_config.json": json.loads((checkpoint / "quantization_config.json").read_text()),
            },
            "stored": {
                name: [NAMES[tensor.dtype], list(tensor.shape)]
                for name, tensor in tensors.items()
                if ".layers." not in name or ".layers.1." in name
            },
            "layers": {
                LAYER: {
                    "tensors": {suffix: spell(cut(tensor, rows)) for suffix, tensor in stored.items()},
                    "dequantized": values,
                }
            },
        }
        (out / f"smollm2-{case.removeprefix('ar-autoround-')}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
