"""
Write an AWQ checkpoint with AutoAWQ itself (abandoned; 0.2.9 is its last), and what AutoAWQ decodes it to.

    python3 -m venv /tmp/witness/venvs/awq
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/awq/bin/pip install torch==2.13.0
    /tmp/witness/venvs/awq/bin/pip install -c /tmp/witness/constraints.txt transformers==4.51.3 accelerate \
        datasets zstandard
    /tmp/witness/venvs/awq/bin/pip install --no-deps autoawq==0.2.9     # with them it would want triton
    OMP_NUM_THREADS=2 /tmp/witness/venvs/awq/bin/python tests/witness/make_autoawq.py \
        .cache/demo/smollm2-135m-bf16 /tmp/witness examples/demo/calibration.txt [NAME ...]

Its transformers knows no `rope_parameters`, so the configuration it is handed says `rope_theta` too.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import cropped, first_layers, for_old_transformers, index_line
from safetensors import safe_open
from safetensors.torch import save_file

BASE = {"q_group_size": 64, "w_bit": 4, "zero_point": True}
SPECS: dict[str, dict[str, Any]] = {
    "awq-w4g64-gemm": {**BASE, "version": "GEMM"},
    "awq-w4g64-gemv": {**BASE, "version": "GEMV"},
    "awq-w4g64-gemv-fast": {**BASE, "version": "GEMVFast"},
}


def decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode with AutoAWQ's own function, given float32 scales."""
    from awq.utils.packing_utils import dequantize_gemm

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    if written["version"] != "gemm":
        raise NotImplementedError(f"AutoAWQ decodes {written['version']} in CUDA only")
    decoded = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if key.endswith(".qweight"):
                name = key.removesuffix(".qweight")
                qweight, qzeros, scales = (file.get_tensor(f"{name}.{p}") for p in ("qweight", "qzeros", "scales"))
                weight = dequantize_gemm(qweight, qzeros, scales.float(), written["bits"], written["group_size"])
                decoded[f"{name}.weight"] = weight.float().T.contiguous()
    return decoded


def main() -> None:
    """Make every checkpoint named, or all of them."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    dense, out, text = (Path(a).resolve() for a in sys.argv[1:4])
    small = first_layers(dense, out / "ckpt" / "dense-2l", 2)  # its search takes minutes a layer on two cores
    narrow = cropped(small, out / "ckpt" / "dense-2l-h512", 512)
    (out / "decompressed").mkdir(parents=True, exist_ok=True)
    for name in sys.argv[4:] or SPECS:
        quant, target, start = SPECS[name], out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        base = small if quant["version"] == "GEMM" else narrow
        source = for_old_transformers(base, out / "scratch" / f"{base.name}-old")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float32)
            lines = [line for line in text.read_text().split("\n") if line.strip()]
            model.quantize(tokenizer, quant_config=quant, calib_data=lines, max_calib_samples=8, max_calib_seq_len=128)
            model.save_quantized(str(partial))
            tokenizer.save_pretrained(partial)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        try:
            decoded = decode(partial)
            note = f"decoded {sorted({str(t.dtype) for t in decoded.values()})}, {len(decoded)} layers"
            save_file(decoded, out / "decompressed" / f"{name}.safetensors")
        except Exception as error:  # noqa: BLE001 - the file is a witness even where its tool cannot read it here
            note = f"NOT decoded: {type(error).__name__}: {error}"[:400]
        partial.rename(target)
        index_line(out, target, f"2 layers; {note}; {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
