"""
What the scripts for mixtures of experts share: names of the dense files, a dense copy of a decoded checkpoint, facts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from common import BOOKKEEPING
from moe_models import WORDS
from safetensors import safe_open
from safetensors.torch import load_file

TOKENS = 48
CHOICES = 16
CALIBRATION = 64
WEIGHT_PARTS = "packed", "scale", "shape", "zero_point", "global_scale", "scale_inv", "scale_2"
INPUT_PARTS = "scale", "zero_point", "global_scale"
STACKED_PARTS = "scale_inv", "blocks", "scales", "weight_scale", "weight_scale_2", "input_scale"
OWN_PARTS = {*(f"weight_{part}" for part in WEIGHT_PARTS), *(f"input_{part}" for part in INPUT_PARTS)}
OWN_PARTS |= {"qweight", "qzeros", "scales", "g_idx"}
OWN_PARTS |= {f"{name}_{part}" for name in ("gate_up_proj", "down_proj") for part in STACKED_PARTS}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def sequences() -> torch.Tensor:
    """Return the sequences of tokens of which each checkpoint is asked one."""
    return torch.randint(4, WORDS, (CHOICES, TOKENS), generator=torch.Generator().manual_seed(1))


def calibration() -> list[list[int]]:
    """Return token sequences to calibrate with: enough that every expert sees some."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4, WORDS, (128,), generator=generator).tolist() for _ in range(CALIBRATION)]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def modules(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors by module, and by their last name in it."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


def dense_name(name: str, family: str) -> str:
    """Return what a tensor is called in the dense checkpoint of its family."""
    if not family.startswith("mixtral"):
        return name
    name = re.sub(r"\.mlp\.(experts|gate)\.", r".block_sparse_moe.\1.", name)
    return re.sub(r"(\.experts\.\d+\.)(gate_proj|up_proj|down_proj)\.", lambda m: m[1] + MIXTRAL[m[2]] + ".", name)


def stacked(tensors: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Return the tensors with the experts stacked where the dense file of the family has them stacked."""
    if not family.startswith(("gemma4", "gpt-oss")):
        return tensors
    pattern = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
    parts: dict[tuple[str, str], dict[str, dict[int, torch.Tensor]]] = {}
    kept = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            parts.setdefault((match[1], match[4]), {}).setdefault(match[3], {})[int(match[2])] = tensor
        else:
            kept[name] = tensor
    for (prefix, suffix), projections in parts.items():
        whole = {key: torch.stack([rows[i] for i in range(len(rows))]) for key, rows in projections.items()}
        both = [whole["gate_proj"], whole["up_proj"]]
        if family.startswith("gemma4"):
            kept[f"{prefix}.gate_up_proj"], kept[f"{prefix}.down_proj"] = torch.cat(both, 1), whole["down_proj"]
        else:
            turned = suffix == "weight"  # [experts, in, out], gates in even columns and the others in odd ones
            end = "" if turned else "_bias"
            mixed = torch.stack(both, 2).flatten(1, 2)
            kept[f"{prefix}.gate_up_proj{end}"] = mixed.mT.contiguous() if turned else mixed
            kept[f"{prefix}.down_proj{end}"] = whole["down_proj"].mT.contiguous() if turned else whole["down_proj"]
    return kept


def dense_state(checkpoint: Path, decoded: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Return a dense state of a checkpoint: what a tool decoded, and what it left whole, in the dense file's names."""
    files = stored(checkpoint)
    whole = {
        name: tensor
        for name, tensor in files.items()
        if name not in decoded
        and name.rpartition(".")[2] not in OWN_PARTS
        and not (name.endswith(".scale") and f"{name.removesuffix('scale')}weight" in files)
    }
    together = {dense_name(name, family): tensor.to(torch.float32) for name, tensor in (whole | decoded).items()}
    return stacked(together, family)


def said(value: Any) -> Any:
    """Drop what a configuration leaves open; an empty object is an answer here (GPTQModel's `dynamic`)."""
    if isinstance(value, dict):
        return {k: said(v) for k, v in value.items() if v is not None and k not in BOOKKEEPING}
    return value


def describe(checkpoint: Path, decoded: list[str]) -> dict[str, Any]:
    """Return what a tool wrote: its configuration, one expert, one dense layer, routers, files."""
    config = json.loads((checkpoint / "config.json").read_text())
    shapes: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata[path.name] = file.metadata()
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                shapes[name] = f"{part.get_dtype()} {part.get_shape()}"
    kept = {
        name: shape
        for name, shape in sorted(shapes.items())
        if not re.search(r"\.experts\.(?!3\.)\d+\.", name) and re.search(r"^(?!.*layers\.)|layers\.[12]\.", name)
    }
    return {
        "quantization_config": said(config.get("quantization_config")),
        "rest of config": {k: v for k, v in config.items() if k != "quantization_config" and "expert" in k},
        "metadata": metadata,
        "files": sorted(path.name for path in checkpoint.iterdir()),
        "tensors": len(shapes),
        "decoded": len(decoded),
        "expert 3 and layers 1 and up": kept,
    }


def record(out: Path, name: str, family: str, note: str) -> None:
    """Print that a checkpoint is made, and keep what it holds for the index."""
    decoded = out / "decompressed" / f"{name}.safetensors"
    facts = describe(out / "ckpt" / name, list(load_file(decoded)) if decoded.exists() else [])
    (out / "facts").mkdir(exist_ok=True)
    written = {"name": name, "family": family, "note": note, **facts}
    (out / "facts" / f"{name}.json").write_text(json.dumps(written, indent=1))
    print(f"{name}: {note}", flush=True)
