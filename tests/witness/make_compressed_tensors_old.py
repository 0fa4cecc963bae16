"""
Write what only older releases of compressed-tensors write: `actorder: group`, and 3 bits unpacked or ten to a word.

    python3 -m venv /tmp/witness/venvs/ctold
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/ctold/bin/pip install torch==2.13.0
    /tmp/witness/venvs/ctold/bin/pip install -c /tmp/witness/constraints.txt transformers==4.57.3 'datasets<5.1' \
        accelerate loguru pyyaml requests tqdm pillow pydantic nvidia-ml-py numpy
    /tmp/witness/venvs/ctold/bin/pip install --no-deps llmcompressor==0.9.0.5 compressed-tensors==0.13.0
    OMP_NUM_THREADS=2 /tmp/witness/venvs/ctold/bin/python tests/witness/make_compressed_tensors_old.py \
        .cache/demo/smollm2-135m-bf16 /tmp/witness examples/demo/calibration.txt [NAME ...]

compressed-tensors 0.20 refuses the first ("actorder='group' has been removed") and packs 3 bits densely, under the same
format name. 0.13 decodes both.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import calibration_windows, first_layers, for_old_transformers, index_line
from safetensors import safe_open
from safetensors.torch import save_file

GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "dynamic": False, "actorder": "group"}
SPECS: dict[str, dict[str, Any]] = {
    "ct013-w4a16-sym-g64-actgroup": {**GROUP, "symmetric": True},
    "ct013-w4a16-asym-g64-actgroup": {**GROUP, "symmetric": False},
    "ct013-w3a16-asym-g64-naive": {**GROUP, "num_bits": 3, "symmetric": False, "actorder": None},
    "ct013-w3a16-asym-g64-pack": {**GROUP, "num_bits": 3, "symmetric": False, "actorder": None},
}


def quantize(dense: Path, target: Path, text: Path, weights: dict[str, Any]) -> None:
    """Write one checkpoint the way llm-compressor's examples do."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, torch_dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier: Any = QuantizationModifier(ignore=["lm_head"], config_groups=groups)
    data: dict[str, Any] = {}
    if weights["actorder"]:
        windows = calibration_windows(tokenizer, text, 512)[:4]
        rows = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows]
        data = {"dataset": Dataset.from_list(rows), "max_seq_length": 512, "num_calibration_samples": len(rows)}
        modifier = GPTQModifier(ignore=["lm_head"], config_groups=groups, actorder="group")
    oneshot(model=model, tokenizer=tokenizer, recipe=[modifier], **data)
    forced = {"quantization_format": "pack-quantized"} if target.name.endswith("-pack.partial") else {}
    model.save_pretrained(target, save_compressed=True, **forced)
    tokenizer.save_pretrained(target)


def decompress(source: Path, widen: bool) -> dict[str, torch.Tensor]:
    """Decode every layer with compressed-tensors; `widen` hands it float32 scales, whose dtype it computes in."""
    from compressed_tensors.compressors import NaiveQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    arguments = QuantizationArgs.model_validate(written["config_groups"]["group_0"]["weights"])
    decoded = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        stored = sorted(file.keys())
        for key in stored:
            if key.endswith(".weight_scale"):
                name = key.removesuffix("_scale")
                keys = [k for k in stored if k.startswith(name)]
                local = {f"weight{k.removeprefix(name)}": file.get_tensor(k) for k in keys}
                if widen:
                    local["weight_scale"] = local["weight_scale"].float()
                packed = "weight_packed" in local
                compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor
                decoded[name] = compressor(config=None).decompress_weight(local, arguments).contiguous()
    return decoded


def main() -> None:
    """Make every checkpoint named, or all of them."""
    dense, out, text = (Path(a).resolve() for a in sys.argv[1:4])
    small = first_layers(dense, out / "ckpt" / "dense-4l", 4)
    source = for_old_transformers(small, out / "scratch" / "dense-4l-old")
    (out / "decompressed").mkdir(parents=True, exist_ok=True)
    for name in sys.argv[4:] or SPECS:
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        quantize(source, partial, text, SPECS[name])
        save_file(decompress(partial, widen=True), out / "decompressed" / f"{name}.safetensors")
        save_file(decompress(partial, widen=False), out / "decompressed" / f"{name}.native.safetensors")
        partial.rename(target)
        index_line(out, target, f"4 layers; decoded ['torch.float32'], native BF16; {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
