"""
Write checkpoints with auto-round (round to nearest, no tuning), and what auto-round itself decodes them to.

    python3 -m venv /tmp/witness/venvs/ar
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/ar/bin/pip install torch==2.13.0
    /tmp/witness/venvs/ar/bin/pip install -c /tmp/witness/constraints.txt auto-round==0.16.1 compressed-tensors==0.20.0
    OMP_NUM_THREADS=2 /tmp/witness/venvs/ar/bin/python tests/witness/make_auto_round.py \
        .cache/demo/smollm2-135m-bf16 /tmp/witness examples/demo/calibration.txt [NAME ...]

Checkpoints go to OUT/ckpt/NAME, the decoded weights to OUT/decompressed/NAME.safetensors. Who decodes: auto-round's own
layers and functions; for its `llm_compressor` exports, compressed-tensors in the same environment.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import calibration_windows, first_layers, index_line
from safetensors import safe_open
from safetensors.torch import save_file

W4 = {"group_size": 64, "sym": True}
W4_ASYM = {"group_size": 64, "sym": False}

# name: (format, scheme, what else AutoRound is told, decoder)
SPECS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "ar-gptq-w4g64": ("auto_gptq", "W4A16", W4, "layers"),
    "ar-awq-w4g64-asym": ("auto_awq", "W4A16", W4_ASYM, "awq"),
    "ar-autoround-w4g64": ("auto_round", "W4A16", W4, "layers"),
    "ar-autoround-w4g64-asym": ("auto_round", "W4A16", W4_ASYM, "layers"),
    "ar-autoround-w3g64": ("auto_round", "W3A16", W4, "layers"),
    "ar-fp8-block": ("fp8", "FP8_BLOCK", {}, "block"),
    "ar-autoround-fp8-block": ("auto_round", "FP8_BLOCK", {}, "block"),
    "ar-llmc-fp8-block": ("llm_compressor", "FP8_BLOCK", {}, "ct"),
    "ar-autoround-mxfp4": ("auto_round", "MXFP4", {}, "layers"),
    "ar-llmc-mxfp4": ("llm_compressor", "MXFP4", {}, "ct"),
    "ar-autoround-mxfp8": ("auto_round", "MXFP8", {}, "layers"),
    "ar-llmc-mxfp8": ("llm_compressor", "MXFP8", {}, "ct"),
    "ar-autoround-nvfp4": ("auto_round", "NVFP4", {}, "layers"),
    "ar-llmc-nvfp4": ("llm_compressor", "NVFP4", {}, "ct"),
    "ar-autoround-fp8-static": ("auto_round", "FP8_STATIC", {}, "layers"),
    "ar-llmc-fp8-static": ("llm_compressor", "FP8_STATIC", {}, "ct"),
    "ar-llmc-int8": ("llm_compressor", "INT8", {}, "ct"),
    "ar-llmc-w4g64-asym": ("llm_compressor", "W4A16", W4_ASYM, "ct"),
    "ar-autoround-mxint4": ("auto_round", "MXINT4", {}, "layers"),
    "ar-autoround-fpw8a16": ("auto_round", "FPW8A16", {}, "layers"),
}


def quantize(dense: Path, target: Path, text: Path, form: str, scheme: str, arguments: dict[str, Any]) -> None:
    """Write one checkpoint; auto-round adds a folder of its own naming, which is taken away."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    windows = calibration_windows(AutoTokenizer.from_pretrained(dense), text, 512)
    batches = [{"input_ids": torch.tensor([w]), "attention_mask": torch.ones(1, len(w))} for w in windows]
    data = {"dataset": batches, "nsamples": len(batches), "seqlen": 512, "batch_size": 1}
    rounding = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    AutoRound(str(dense), scheme=scheme, **rounding, **data, **arguments).quantize_and_save(str(target), format=form)
    if not (target / "config.json").exists():
        (inner,) = target.iterdir()
        for file in inner.iterdir():
            file.rename(target / file.name)
        inner.rmdir()


def layers_decode(source: Path) -> dict[str, torch.Tensor]:
    """Load the checkpoint the way auto-round's users do, and ask each of its layers for its weight in float32."""
    import auto_round  # noqa: F401 - registers itself with transformers
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    reader = {"quantization_config": AutoRoundConfig()} if written["quant_method"] == "gptq" else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map="cpu", **reader)
    decoded = {}
    for name, module in model.named_modules():
        if hasattr(module, "dequant_weight_online"):
            module.dtype = torch.float32
            for scale in ("weight_scale",):
                held = getattr(module, scale)
                if held.dtype in (torch.bfloat16, torch.float16):
                    setattr(module, scale, torch.nn.Parameter(held.float(), requires_grad=False))
            decoded[f"{name}.weight"] = module.dequant_weight_online().detach().clone().contiguous()
        elif hasattr(module, "qweight"):
            module.scales = module.scales.float()
            features = getattr(module, "infeatures", None) or module.in_features
            decoded[f"{name}.weight"] = module(torch.eye(features)).detach().T.contiguous()
    return decoded


def awq_decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode with the function that auto-round's AWQ layer calls, given float32 scales."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    decoded = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if key.endswith(".qweight"):
                name = key.removesuffix(".qweight")
                parts = (file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
                qweight, qzeros, scales = parts
                weight = dequantize_gemm(qweight, qzeros, scales.float(), written["bits"], written["group_size"])
                decoded[f"{name}.weight"] = weight.T.contiguous()
    return decoded


def block_decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode with the function that auto-round reads block FP8 checkpoints with, given float32 scales."""
    from auto_round.utils.weight_handler import _dequant_fp8_linear_weight

    decoded = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for key in sorted(stored):
            for suffix in ("_scale_inv", "_scale"):
                if f"{key}{suffix}" in stored:
                    scale = file.get_tensor(f"{key}{suffix}").float()
                    weight = _dequant_fp8_linear_weight(file.get_tensor(key), scale, block_size=[128, 128])
                    decoded[key] = weight.contiguous()
    return decoded


def decode(kind: str, source: Path) -> dict[str, torch.Tensor]:
    """Decode every quantized layer of a checkpoint."""
    if kind == "ct":
        from make_compressed_tensors import decompress

        return decompress(source, widen=True)
    return {"layers": layers_decode, "awq": awq_decode, "block": block_decode}[kind](source)


def main() -> None:
    """Make every checkpoint named, or all of them."""
    dense, out, text = (Path(a).resolve() for a in sys.argv[1:4])
    small = first_layers(dense, out / "ckpt" / "dense-4l", 4)
    (out / "decompressed").mkdir(parents=True, exist_ok=True)
    failed = []
    for name in sys.argv[4:] or SPECS:
        form, scheme, arguments, kind = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if (out / "decompressed" / f"{name}.safetensors").exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if target.exists():
                target.rename(partial)
            else:
                quantize(small, partial, text, form, scheme, arguments)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        try:
            decoded = decode(kind, partial)
            note = f"decoded {sorted({str(t.dtype) for t in decoded.values()})}, {len(decoded)} layers"
        except Exception as error:  # noqa: BLE001 - the file is a witness even where its tool cannot read it
            decoded, note = {}, f"NOT decoded: {type(error).__name__}: {error}"[:400]
            print(f"UNDECODED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
        if decoded:
            save_file(decoded, out / "decompressed" / f"{name}.safetensors")
        partial.rename(target)
        index_line(out, target, f"4 layers; {note}; {time.time() - start:.0f} s")
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
