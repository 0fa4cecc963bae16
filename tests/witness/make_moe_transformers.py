"""
Write mixtures of experts in FP8 with transformers itself, and gpt-oss in MXFP4 as its released files are.

The environment is that of make_transformers.py; the dense models are those of moe_models.py.

    OMP_NUM_THREADS=1 /tmp/witness/venvs/hf/bin/python tests/witness/make_moe_transformers.py /tmp/witness [NAME ...]

Checkpoints go to OUT/ckpt/NAME, what transformers decodes them to in float32 to OUT/decompressed/NAME.safetensors
(experts under the names of the file: stacked where they are stacked), what the files hold to OUT/facts/NAME.json.

What 5.23.0 saves, it cannot read: experts are split into one weight each, and their scales stay stacked, under the name
that the module has in memory. Loaded again, on a machine without a GPU, the scales are reported as unexpected, and the
experts are 1,700 times too large. So those files are decoded with the function that it decodes a stacked module with.

Two kinds are laid out here from bytes that a tool wrote, since released files look so and no tool writes them on a CPU;
what decodes them is transformers' own loader, run with `dequantize`, so nothing here says what a byte means.
`released`: FP8 with a scale for each expert's own weight, from the file that transformers saved before it. `mxfp4`:
gpt-oss, from the bytes that compressed-tensors wrote for moe-ct-gpt-oss-mxfp4a16 (make that one first): experts in
one tensor, gate rows even and up rows odd, blocks of 16 bytes, all else in BF16.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from moe_common import record, stored
from safetensors.torch import load_file, save_file

BLOCK = 16
"""Bytes of a block of 32 values."""
MODULES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What Mixtral calls them."""
SKIPPED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]

# By name: the family, how, and the arguments of the tool's configuration.
SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "moe-hf-qwen3-fp8-block128": ("qwen3-moe", "original", {"weight_block_size": (128, 128)}),
    "moe-hf-qwen3-fp8-block128-stacked": ("qwen3-moe", "in memory", {"weight_block_size": (128, 128)}),
    "moe-hf-qwen3-fp8-block128-ue8m0": (
        "qwen3-moe",
        "original",
        {"weight_block_size": (128, 128), "scale_fmt": "ue8m0"},
    ),
    "moe-hf-qwen3-fp8-tensor": ("qwen3-moe", "original", {"weight_block_size": None}),
    "moe-hf-mixtral-fp8-block128": ("mixtral", "original", {"weight_block_size": (128, 128)}),
    "moe-hf-deepseek-v3-fp8-block32": ("deepseek-v3", "original", {"weight_block_size": (32, 32)}),
    "moe-hf-deepseek-v3-fp8-block128": ("deepseek-v3", "original", {"weight_block_size": (128, 128)}),
    "moe-hf-glm4-fp8-block128": ("glm4-moe", "original", {"weight_block_size": (128, 128)}),
    "moe-hf-gemma4-fp8-block64": ("gemma4", "original", {"weight_block_size": (64, 64)}),
    "moe-hf-qwen3-fp8-released": ("qwen3-moe", "released", {"of": "moe-hf-qwen3-fp8-block128"}),
    "moe-hf-mixtral-fp8-released": ("mixtral", "released", {"of": "moe-hf-mixtral-fp8-block128"}),
    "moe-hf-deepseek-v3-fp8-released": ("deepseek-v3", "released", {"of": "moe-hf-deepseek-v3-fp8-block32"}),
    "moe-hf-gpt-oss-mxfp4": ("gpt-oss", "mxfp4", {"of": "moe-ct-gpt-oss-mxfp4a16"}),
    # In models small enough to be kept with the tests.
    "small-hf-qwen3-fp8-block32-stacked": ("qwen3-moe-small", "in memory", {"weight_block_size": (32, 32)}),
    "small-hf-mixtral-fp8-block32": ("mixtral-small", "original", {"weight_block_size": (32, 32)}),
    "small-hf-mixtral-fp8-released": ("mixtral-small", "released", {"of": "small-hf-mixtral-fp8-block32"}),
    "small-hf-gpt-oss-mxfp4": ("gpt-oss-small", "mxfp4", {"of": "small-ct-gpt-oss-mxfp4a16"}),
}


def quantize(dense: Path, target: Path, how: str, arguments: dict[str, Any]) -> None:
    """Write an FP8 checkpoint, in the names of the original files or in those that the modules have in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    FineGrainedFP8HfQuantizer.validate_environment = lambda *_, **__: None
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(**arguments), device_map="cpu"
    )
    model.save_pretrained(target, save_original_format=how == "original")
    AutoTokenizer.from_pretrained(dense).save_pretrained(target)


def lay_out(source: Path, dense: Path, target: Path) -> None:
    """Write gpt-oss in MXFP4 from the bytes of compressed-tensors."""
    bytes_of = stored(source)
    count = json.loads((dense / "config.json").read_text())["num_local_experts"]
    state = {
        name: tensor
        for name, tensor in load_file(dense / "model.safetensors").items()
        if not name.endswith((".gate_up_proj", ".down_proj"))
    }
    for prefix in sorted({name.partition(".experts.")[0] for name in bytes_of if ".experts." in name}):
        for part, suffix in (("weight_packed", "blocks"), ("weight_scale", "scales")):
            rows = {
                projection: torch.stack([bytes_of[f"{prefix}.experts.{e}.{projection}.{part}"] for e in range(count)])
                for projection in ("gate_proj", "up_proj", "down_proj")
            }
            both = torch.stack([rows["gate_proj"], rows["up_proj"]], 2).flatten(1, 2)
            for projection, whole in (("gate_up_proj", both), ("down_proj", rows["down_proj"])):
                value = whole.unflatten(-1, (-1, BLOCK)) if suffix == "blocks" else whole
                state[f"{prefix}.experts.{projection}_{suffix}"] = value.contiguous()
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    for other in dense.iterdir():
        if other.name not in ("config.json", "model.safetensors"):
            shutil.copy(other, target / other.name)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"modules_to_not_convert": SKIPPED, "quant_method": "mxfp4"}
    (target / "config.json").write_text(json.dumps(config, indent=2))


def experts_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, list[str]]]:
    """Return, by the name of a stacked scale, the names of the weights that it is for, in its order of rows."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in tensors:
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            projection = MODULES.get(match[3], match[3])
            whole = "down_proj" if projection == "down_proj" else "gate_up_proj"
            found.setdefault(f"{match[1]}.{whole}_scale_inv", {}).setdefault(projection, []).append(name)
    return {
        scale: {
            p: sorted(names, key=lambda n: int(re.sub(r".*\.experts\.(\d+)\..*", r"\1", n)))
            for p, names in rows.items()
        }
        for scale, rows in found.items()
        if scale in tensors
    }


def fp8_decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode an FP8 file with the function that transformers decodes a module with, in float32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = stored(source)
    decode = Fp8Dequantize(None)._dequantize_one
    decoded = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name.removesuffix('weight')}scale"))
        if tensor.dtype == torch.float8_e4m3fn and scale is not None:
            decoded[name] = decode(tensor, scale, output_dtype=torch.float32).contiguous()
    for scale_name, rows in experts_of(tensors).items():
        order = [rows[p] for p in ("gate_proj", "up_proj", "down_proj") if p in rows]
        whole = torch.cat([torch.stack([tensors[n] for n in names]).view(torch.uint8) for names in order], 1)
        values = decode(whole.view(torch.float8_e4m3fn), tensors[scale_name], output_dtype=torch.float32)
        for names, part in zip(order, values.chunk(len(order), 1), strict=True):
            decoded |= {name: part[number].contiguous() for number, name in enumerate(names)}
    return decoded


def release(source: Path, target: Path) -> None:
    """Lay an FP8 file out as released ones are: a `weight_scale_inv` beside each expert's weight."""
    tensors = stored(source)
    for scale_name, rows in experts_of(tensors).items():
        scales = tensors.pop(scale_name)
        for projection, part in zip(rows, scales.chunk(len(rows), 1), strict=True):
            for number, name in enumerate(rows[projection]):
                tensors[f"{name}_scale_inv"] = part[number].contiguous()
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    layers = range(config["num_hidden_layers"])
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{number}.mlp.gate" for number in layers)],
        "quant_method": "fp8",
        "weight_block_size": config["quantization_config"]["weight_block_size"],
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def loaded(source: Path, config: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Let transformers load a file dense, in float32, and return what it makes of the parameters named."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config, device_map="cpu", output_loading_info=True
    )
    if wrong := {key: sorted(value) for key, value in report.items() if value}:
        raise ValueError(f"{source.name} did not load whole: {wrong}")
    parameters = dict(model.named_parameters())
    decoded = {}
    for name in names:
        if name in parameters:
            decoded[name] = parameters[name].detach().clone().contiguous()
            continue
        prefix, expert, projection = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name).groups()
        projection = MODULES.get(projection, projection)
        prefix = prefix.replace(".block_sparse_moe.", ".mlp.")
        whole = parameters[f"{prefix}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)]
        rows = {"gate_proj": 0, "up_proj": 1}.get(projection)
        decoded[name] = (whole if rows is None else whole.chunk(2)[rows]).detach().clone().contiguous()
    return decoded


def make(out: Path, partial: Path, family: str, how: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write one checkpoint, and return what transformers decodes it to."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    if how == "mxfp4":
        lay_out(out / "ckpt" / arguments["of"], out / "ckpt" / f"dense-moe-{family}", partial)
        names = [name for name in stored(partial) if name.endswith("_blocks")]
        return loaded(partial, Mxfp4Config(dequantize=True), [name.removesuffix("_blocks") for name in names])
    if how == "released":
        release(out / "ckpt" / arguments["of"], partial)
        names = [name for name, tensor in stored(partial).items() if tensor.dtype == torch.float8_e4m3fn]
        return loaded(partial, FineGrainedFP8Config(dequantize=True), names)
    quantize(out / "ckpt" / f"dense-moe-{family}", partial, how, arguments)
    return fp8_decode(partial)


def main() -> None:
    """Make every checkpoint named, or all of them."""
    out = Path(sys.argv[1]).resolve()
    failed = []
    for name in sys.argv[2:] or SPECS:
        family, how, arguments = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            decoded = make(out, partial, family, how, arguments)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        save_file(decoded, out / "decompressed" / f"{name}.safetensors")
        partial.rename(target)
        record(out, name, family, f"{time.time() - start:.0f} s")
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
