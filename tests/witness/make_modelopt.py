"""
Write checkpoints with NVIDIA's ModelOpt, dense ones and mixtures of experts, and what ModelOpt itself decodes them to.

    python3 -m venv /tmp/witness/venvs/mo
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/mo/bin/pip install torch==2.13.0
    /tmp/witness/venvs/mo/bin/pip install -c /tmp/witness/constraints.txt nvidia-modelopt==0.47.0 \
        transformers==5.14.1 accelerate datasets requests
    OMP_NUM_THREADS=1 /tmp/witness/venvs/mo/bin/python tests/witness/make_modelopt.py /tmp/witness [NAME ...]

The dense models are SmolLM2's first two layers (the other scripts leave `dense-4l` to be cut) and those of
moe_models.py. Checkpoints go to OUT/ckpt/NAME, the decoded weights in float32 to OUT/decompressed/NAME.safetensors (by
the methods of its tensor classes, given what the file holds), and facts about experts to OUT/facts/NAME.json.

On a CPU it cannot run the searches of AWQ and SVDQuant for NVFP4. Its int4 files are not decoded (it has no way back),
nor is SmoothQuant's, whose weights mean nothing without `pre_quant_scale`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import cropped, first_layers, index_line
from moe_common import calibration, modules, record, stored
from safetensors.torch import save_file

# By name: the dense checkpoint, and the name of ModelOpt's configuration.
SPECS: dict[str, tuple[str, str]] = {
    "mo-fp8": ("dense-2l", "FP8_DEFAULT_CFG"),
    "mo-fp8-channel-token": ("dense-2l", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "mo-fp8-block128-wo": ("dense-2l-h512", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "mo-fp8-kvcache-fp8": ("dense-2l", "FP8_KV"),
    "mo-nvfp4": ("dense-2l", "NVFP4_DEFAULT_CFG"),
    "mo-nvfp4-wo": ("dense-2l", "W4A16_NVFP4_CFG"),
    "mo-nvfp4-mlp-only": ("dense-2l", "NVFP4_MLP_ONLY_CFG"),
    "mo-nvfp4-a8": ("dense-2l", "W4A8_NVFP4_FP8_CFG"),
    "mo-mxfp8": ("dense-2l", "MXFP8_DEFAULT_CFG"),
    "mo-mxfp4": ("dense-2l", "MXFP4_DEFAULT_CFG"),
    "mo-mxfp4-a8": ("dense-2l", "W4A8_MXFP4_FP8_CFG"),
    "mo-int8": ("dense-2l", "INT8_DEFAULT_CFG"),
    "mo-int8-smoothquant": ("dense-2l", "INT8_SMOOTHQUANT_CFG"),
    "mo-int8-wo": ("dense-2l", "INT8_WEIGHT_ONLY_CFG"),
    "mo-int4-awq": ("dense-2l-h512", "INT4_AWQ_CFG"),
    "mo-w4a8-awq": ("dense-2l-h512", "W4A8_AWQ_BETA_CFG"),
    "moe-mo-qwen3-fp8": ("dense-moe-qwen3-moe", "FP8_DEFAULT_CFG"),
    "moe-mo-qwen3-fp8-channel-token": ("dense-moe-qwen3-moe", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "moe-mo-qwen3-fp8-block128-wo": ("dense-moe-qwen3-moe", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "moe-mo-qwen3-nvfp4": ("dense-moe-qwen3-moe", "NVFP4_DEFAULT_CFG"),
    "moe-mo-qwen3-mxfp8": ("dense-moe-qwen3-moe", "MXFP8_DEFAULT_CFG"),
    "moe-mo-qwen3-int8": ("dense-moe-qwen3-moe", "INT8_DEFAULT_CFG"),
    "moe-mo-mixtral-nvfp4-experts-only": ("dense-moe-mixtral", "NVFP4_EXPERTS_ONLY_CFG"),
    "moe-mo-deepseek-v3-nvfp4": ("dense-moe-deepseek-v3", "NVFP4_DEFAULT_CFG"),
    "moe-mo-glm4-nvfp4-wo": ("dense-moe-glm4-moe", "W4A16_NVFP4_CFG"),
    "moe-mo-gpt-oss-nvfp4": ("dense-moe-gpt-oss", "NVFP4_DEFAULT_CFG"),
    "moe-mo-gpt-oss-mxfp4-wo": ("dense-moe-gpt-oss", "MXFP4_MLP_WEIGHT_ONLY_CFG"),
    "moe-mo-gemma4-nvfp4": ("dense-moe-gemma4", "NVFP4_DEFAULT_CFG"),
    "small-mo-qwen3-fp8": ("dense-moe-qwen3-moe-small", "FP8_DEFAULT_CFG"),
    "small-mo-mixtral-nvfp4": ("dense-moe-mixtral-small", "NVFP4_DEFAULT_CFG"),
    "small-mo-gpt-oss-nvfp4": ("dense-moe-gpt-oss-small", "NVFP4_DEFAULT_CFG"),
}
STACKED = ("gate_up_proj", "down_proj")


def quantize(dense: Path, target: Path, wish: str) -> None:
    """Write one checkpoint the way ModelOpt's examples do."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)

    def run(quantized: Any) -> None:
        for row in calibration()[:32]:
            quantized(torch.tensor([row]))

    config = getattr(mtq, "FP8_DEFAULT_CFG" if wish == "FP8_KV" else wish)
    if wish == "FP8_KV":
        config = mtq.utils.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = mtq.quantize(model, config, run)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=target)
    for other in dense.iterdir():
        if other.name.startswith("tokenizer"):
            shutil.copy(other, target / other.name)


def decoded_tensor(algorithm: str, weight: torch.Tensor, local: dict[str, torch.Tensor]) -> torch.Tensor:
    """Decode a weight `[..., N, K]` by the class that ModelOpt has for its kind of tensor."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    scale, kind = local["weight_scale"], algorithm.upper()
    whole = torch.Size((*weight.shape[:-1], weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)))
    if "NVFP4" in kind:
        width = {-1: whole[-1] // scale.shape[-1]}
        tensor = NVFP4QTensor(whole, torch.float32, weight)
        return tensor.dequantize(torch.float32, scale=scale, double_scale=local["weight_scale_2"], block_sizes=width)
    if "MXFP4" in kind:
        return MXFP4QTensor(whole, torch.float32, weight).dequantize(torch.float32, scale=scale, block_sizes=[32])
    if kind == "MXFP8":
        return MXFP8QTensor(whole, torch.float32, weight).dequantize(torch.float32, scale=scale)
    tensor = (INT8QTensor if weight.dtype == torch.int8 else FP8QTensor)(whole, torch.float32, weight)
    if scale.ndim == 4:  # blocks, with axes that were kept
        blocks = {-1: 128, -2: 128}
        return tensor.dequantize(torch.float32, scale=scale[:, 0, :, 0], block_sizes=blocks)
    return tensor.dequantize(torch.float32, scale=scale.unsqueeze(-1) if scale.ndim == 1 else scale)


def decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode every quantized layer of a file."""
    algorithm = json.loads((source / "config.json").read_text())["quantization_config"]["quant_algo"]
    decoded = {}
    for name, local in modules(stored(source)).items():
        if "weight_scale" in local and "pre_quant_scale" not in local:
            decoded[f"{name}.weight"] = decoded_tensor(algorithm, local["weight"], local).contiguous()
        for part in STACKED:
            if f"{part}_weight_scale" not in local:
                continue
            # Experts of gpt-oss lie as [E, in, out]: packed along "in" with NVFP4, and along "out" with MXFP4.
            turned = "NVFP4" in algorithm
            held = {key.removeprefix(f"{part}_"): tensor for key, tensor in local.items() if key.startswith(f"{part}_")}
            if turned:
                held["weight_scale"] = held["weight_scale"].mT
            values = decoded_tensor(algorithm, local[part].mT.contiguous() if turned else local[part], held)
            decoded[f"{name}.{part}"] = (values.mT if turned else values).contiguous()
    return decoded


def main() -> None:
    """Make every checkpoint named, or all of them."""
    out = Path(sys.argv[1]).resolve()
    first_layers(out / "ckpt" / "dense-4l", out / "ckpt" / "dense-2l", 2)
    cropped(out / "ckpt" / "dense-2l", out / "ckpt" / "dense-2l-h512", 512)
    failed = []
    for name in sys.argv[2:] or SPECS:
        dense, wish = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            quantize(out / "ckpt" / dense, partial, wish)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        note = f"{time.time() - start:.0f} s"
        try:
            decoded = decode(partial)
            save_file(decoded, out / "decompressed" / f"{name}.safetensors")
            note += f"; {len(decoded)} decoded"
        except Exception as error:  # noqa: BLE001 - the file is a witness even where it was not decoded
            note += f"; NOT decoded: {type(error).__name__}: {error}"[:400]
        partial.rename(target)
        if dense.startswith("dense-moe-"):
            record(out, name, dense.removeprefix("dense-moe-"), note)
        else:
            index_line(out, target, f"2 layers; {note}")
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
