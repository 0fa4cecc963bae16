"""
Write checkpoints with GPTQModel (GPTQ with activation order, AWQ, FP8), and what GPTQModel itself decodes them to.

    python3 -m venv /tmp/witness/venvs/gq
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/gq/bin/pip install torch==2.13.0
    /tmp/witness/venvs/gq/bin/pip install -c /tmp/witness/constraints.txt transformers==5.23.0 accelerate numpy \
        safetensors threadpoolctl packaging device-smi protobuf pillow requests pypcre tokenicer logbar jinja2 ninja \
        datasets pyarrow dill torchao defuser maturin setuptools wheel
    /tmp/witness/venvs/gq/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0   # it asks for torch>=2.14.1
    GPTQMODEL_CPU_WORKERS=2 OMP_NUM_THREADS=2 /tmp/witness/venvs/gq/bin/python tests/witness/make_gptqmodel.py \
        .cache/demo/smollm2-135m-bf16 /tmp/witness examples/demo/calibration.txt [NAME ...]

Without GPTQMODEL_CPU_WORKERS it raises on a machine with two cores. Its AWQ layouts gemv and gemv_fast want CUDA to be
packed. Checkpoints go to OUT/ckpt/NAME, the decoded weights to OUT/decompressed/NAME.safetensors (float32: the tool's
functions given the file's scales in float32; on its own it rounds them to BF16 as it loads).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import calibration_windows, cropped, first_layers, index_line
from safetensors import safe_open
from safetensors.torch import save_file

W4 = {"bits": 4, "group_size": 64}
AWQ = {**W4, "method": "awq"}

# name: (cropped to hidden 512, arguments)
SPECS: dict[str, tuple[bool, dict[str, Any]]] = {
    "gq-gptq-w4g64-sym-actorder": (False, {**W4, "sym": True, "desc_act": True}),
    "gq-gptq-w4g64-asym-actorder": (False, {**W4, "sym": False, "desc_act": True}),
    "gq-awq-w4g64-gemm": (False, {**AWQ, "sym": False, "format": "gemm"}),
    "gq-awq-w4g64-gemm-sym": (False, {**AWQ, "sym": True, "format": "gemm"}),
    "gq-gptqv2-w4g64-asym-actorder": (False, {**W4, "sym": False, "desc_act": True, "format": "gptq_v2"}),
    "gq-fp8-row": (False, {"bits": 8, "method": "fp8", "format": "float8_e4m3fn", "weight_scale_method": "row"}),
    "gq-fp8-block128": (True, {"bits": 8, "method": "fp8", "format": "float8_e4m3fn", "weight_block_size": [128, 128]}),
}


def quantize(dense: Path, target: Path, text: Path, arguments: dict[str, Any]) -> None:
    """Write one checkpoint the way GPTQModel's examples do."""
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig
    from transformers import AutoTokenizer

    windows = calibration_windows(AutoTokenizer.from_pretrained(dense), text, 512)
    data = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows]
    model = GPTQModel.load(str(dense), QuantizeConfig(**arguments, offload_to_disk=False), device="cpu")
    model.quantize(None if arguments.get("method") == "fp8" else data, batch_size=1)
    model.save(str(target))


def decode(source: Path) -> dict[str, torch.Tensor]:
    """Ask GPTQModel's plain torch layers for their weights, in float32."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    decoded: dict[str, torch.Tensor] = {}
    if written["quant_method"] == "awq":
        with safe_open(source / "model.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key.endswith(".qweight"):
                    name = key.removesuffix(".qweight")
                    parts = (file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
                    qweight, qzeros, scales = parts
                    weight = dequantize_gemm(qweight, qzeros, scales.float(), written["bits"], written["group_size"])
                    decoded[f"{name}.weight"] = weight.T.contiguous()
        return decoded
    fp8 = written["quant_method"] == "fp8"
    model = GPTQModel.load(str(source), backend=BACKEND.FP8_TORCH if fp8 else BACKEND.GPTQ_TORCH, device="cpu")
    with safe_open(source / "model.safetensors", "pt") as file:
        for name, module in model.model.named_modules():
            if not hasattr(module, "dequantize_weight"):
                continue
            # GPTQModel casts scales to BF16 as it loads: give it back what the file says
            if fp8:
                module.weight_scale_inv = file.get_tensor(f"{name}.weight_scale_inv").float()
                weight = module.dequantize_weight(device="cpu", dtype=torch.float32)
            else:
                module.scales = file.get_tensor(f"{name}.scales").float()
                weight = module.dequantize_weight()
            decoded[f"{name}.weight"] = weight.detach().float().T.contiguous()
    return decoded


def main() -> None:
    """Make every checkpoint named, or all of them."""
    dense, out, text = (Path(a).resolve() for a in sys.argv[1:4])
    small = first_layers(dense, out / "ckpt" / "dense-4l", 4)
    narrow = cropped(small, out / "ckpt" / "dense-4l-h512", 512)
    (out / "decompressed").mkdir(parents=True, exist_ok=True)
    failed = []
    for name in sys.argv[4:] or SPECS:
        crop, arguments = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if (out / "decompressed" / f"{name}.safetensors").exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if target.exists():
                target.rename(partial)
            else:
                quantize(narrow if crop else small, partial, text, dict(arguments))
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        try:
            decoded = decode(partial)
            note = f"decoded {sorted({str(t.dtype) for t in decoded.values()})}, {len(decoded)} layers"
        except Exception as error:  # noqa: BLE001 - the file is a witness even where its tool cannot read it
            decoded, note = {}, f"NOT decoded: {type(error).__name__}: {error}"[:400]
        if decoded:
            save_file(decoded, out / "decompressed" / f"{name}.safetensors")
        partial.rename(target)
        index_line(out, target, f"4 layers; {note}; {time.time() - start:.0f} s")
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
