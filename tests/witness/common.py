"""
What every witness script needs: calibration windows, a model cut to its first layers, and a line for the index.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

BOOKKEEPING = ("quantization_status", "global_compression_ratio", "sparsity_config", "transform_config", "meta")


def first_layers(dense: Path, target: Path, layers: int) -> Path:
    """Copy a dense Llama checkpoint with its first layers only."""
    if target.exists():
        return target
    target.mkdir(parents=True)
    config = json.loads((dense / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (target / "config.json").write_text(json.dumps(config, indent=2))
    with safe_open(dense / "model.safetensors", "pt") as file:
        kept = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - not a mapping
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
        }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for other in dense.iterdir():
        if other.name not in ("config.json", "model.safetensors"):
            shutil.copy(other, target / other.name)
    return target


def cropped(dense: Path, target: Path, hidden: int) -> Path:
    """Cut a dense Llama checkpoint to the first columns of everything hidden: no model any more, but real weights."""
    if target.exists():
        return target
    target.mkdir(parents=True)
    config = json.loads((dense / "config.json").read_text())
    old, head = config["hidden_size"], config["head_dim"]
    heads = hidden // head
    kept_kv = heads * config["num_key_value_heads"] // config["num_attention_heads"]
    old_kv, new_kv = config["num_key_value_heads"] * head, kept_kv * head
    config.update(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kept_kv)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    with safe_open(dense / "model.safetensors", "pt") as file:
        kept = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            for dim, size in enumerate(tensor.shape):
                new = {old: hidden, old_kv: new_kv}.get(size, size)
                tensor = tensor.narrow(dim, 0, new)
            kept[name] = tensor.contiguous()
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for other in dense.iterdir():
        if other.name not in ("config.json", "model.safetensors"):
            shutil.copy(other, target / other.name)
    return target


def for_old_transformers(dense: Path, target: Path) -> Path:
    """Copy a checkpoint, and spell rotary base and tokenizer the way transformers 4 reads them."""
    if not target.exists():
        shutil.copytree(dense, target)
        config = json.loads((target / "config.json").read_text())
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        config["torch_dtype"] = config["dtype"]
        (target / "config.json").write_text(json.dumps(config, indent=2))
        tokenizer = json.loads((target / "tokenizer_config.json").read_text())
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        (target / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    return target


def calibration_windows(tokenizer: Any, text: Path, length: int) -> list[list[int]]:
    """Return the text as full windows of token numbers."""
    numbers = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    return [numbers[i : i + length] for i in range(0, len(numbers) - length + 1, length)]


def without_nothing(value: Any) -> Any:
    """Drop what says nothing from a configuration."""
    if isinstance(value, dict):
        kept = {k: without_nothing(v) for k, v in value.items() if k not in BOOKKEEPING}
        return {k: v for k, v in kept.items() if v is not None and v != {}}
    return value


def layer(checkpoint: Path, prefix: str = "model.layers.1.mlp.down_proj.") -> str:
    """Describe the tensors of one layer."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(prefix):
                    part = file.get_slice(name)
                    found[name.removeprefix(prefix)] = f"{part.get_dtype()} {part.get_shape()}"
    return ", ".join(f"`{k}` {v}" for k, v in sorted(found.items()))


def index_line(out: Path, checkpoint: Path, note: str) -> None:
    """Append the checkpoint to the index that others read meanwhile."""
    config = without_nothing(json.loads((checkpoint / "config.json").read_text()).get("quantization_config", {}))
    line = f"- `{checkpoint}` ({note}) — `{json.dumps(config, sort_keys=True)}` — down_proj: {layer(checkpoint)}\n"
    with (out / "INDEX.md").open("a") as index:
        index.write(line)
    print(line, flush=True)
