"""
Cut the experts out of the small checkpoints, for the test beside this file that needs no tool.

    python tests/witness/cut_experts.py /tmp/witness [NAME ...]

golden/NAME.json gets config.json as it was written, every tensor of the experts, dtype and shape of those beside them
that stayed dense, and, by container, what the tool decodes each expert to: the SHA-256 of the float32 values of gate
and up, `[2I, H]`, and of down, `[H, I]`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from experts import by_expert
from safetensors import safe_open
from safetensors.torch import load_file

HERE = Path(__file__).parent / "golden"


def spelled(tensor: torch.Tensor, dtype: str) -> dict[str, Any]:
    """Return a tensor as JSON."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's float32 values, of which zero has no sign."""
    return hashlib.sha256((tensor.to(torch.float32) + 0.0).contiguous().numpy().tobytes()).hexdigest()


def cut(out: Path, name: str) -> dict[str, Any]:
    """Return what is kept of a checkpoint."""
    checkpoint = out / "ckpt" / name
    tensors: dict[str, Any] = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
        whole = {key.rpartition(".")[0] for key in names if ".experts." not in key and not key.endswith(".weight")}
        for key in names:
            if ".experts." in key:
                tensors[key] = spelled(file.get_tensor(key), file.get_slice(key).get_dtype())
            elif key.endswith(".weight") and key.removesuffix(".weight") not in whole and "self_attn" not in key:
                tensors[key] = {"dtype": file.get_slice(key).get_dtype(), "shape": file.get_slice(key).get_shape()}
    decoded = load_file(out / "decompressed" / f"{name}.safetensors")
    family = json.loads((out / "facts" / f"{name}.json").read_text())["family"]
    return {
        "config": json.loads((checkpoint / "config.json").read_text()),
        "tensors": tensors,
        "decoded": {
            container: [
                [digest(torch.cat([parts["gate_proj"], parts["up_proj"]])), digest(parts["down_proj"])]
                for _, parts in sorted(experts.items())
            ]
            for container, experts in by_expert(decoded, interleaved=family.startswith("gpt-oss")).items()
        },
    }


def main() -> None:
    """Cut every checkpoint named, or all small ones."""
    out = Path(sys.argv[1]).resolve()
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[2:] or sorted(path.name for path in (out / "ckpt").glob("small-*")):
        text = json.dumps(cut(out, name), indent=1)
        (HERE / f"{name}.json").write_text(text + "\n")
        print(name, len(text), flush=True)


if __name__ == "__main__":
    main()
