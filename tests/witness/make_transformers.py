"""
Write checkpoints with transformers itself: its fine-grained FP8, and torchao's schemes saved through it.

    python3 -m venv /tmp/witness/venvs/hf
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/hf/bin/pip install torch==2.13.0
    /tmp/witness/venvs/hf/bin/pip install -c /tmp/witness/constraints.txt torchao==0.18.0 transformers==5.23.0 \
        accelerate==1.15.0
    OMP_NUM_THREADS=2 /tmp/witness/venvs/hf/bin/python tests/witness/make_transformers.py \
        .cache/demo/smollm2-135m-bf16 /tmp/witness [NAME ...]

Checkpoints go to OUT/ckpt/NAME, the tool's decoded weights to OUT/decompressed/NAME.safetensors.

Fine-grained FP8 refuses to quantize without a GPU, though its arithmetic is plain torch: that one check is switched
off. It leaves every matrix that its blocks do not tile unquantized, silently, which at 128 x 128 is every matrix of
SmolLM2 (576 = 4.5 x 128). So the 128 x 128 file comes from a model cropped to hidden 512, and the uncropped one uses
64 x 64. `hf-fp8-block128-ragged` is what comes out otherwise: BF16 weights, with scales that nobody ever wrote to.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import cropped, first_layers, index_line
from safetensors import safe_open
from safetensors.torch import save_file


def torchao_config(name: str) -> Any:
    """Return a torchao configuration by its short name."""
    from torchao import quantization as ao

    return {
        "int8wo": lambda: ao.Int8WeightOnlyConfig(),
        "int8wo-g64": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64)),
        "float8wo": lambda: ao.Float8WeightOnlyConfig(),
        "int8dyn": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "float8dyn-row": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        "int4wo-intx-g32": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "int8dyn-int4-g32": lambda: ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
        ),
    }[name]()


# name: (cropped to hidden 512, kind, arguments)
SPECS: dict[str, tuple[bool, str, Any]] = {
    "hf-fp8-block128": (True, "fp8", {"weight_block_size": (128, 128)}),
    "hf-fp8-block64": (False, "fp8", {"weight_block_size": (64, 64)}),
    "hf-fp8-block128-ue8m0": (True, "fp8", {"weight_block_size": (128, 128), "scale_fmt": "ue8m0"}),
    "hf-fp8-block128-ragged": (False, "fp8", {"weight_block_size": (128, 128)}),
    "hf-fp8-tensor": (False, "fp8", {"weight_block_size": None}),
    "ao-int8wo": (False, "ao", "int8wo"),
    "ao-float8wo": (False, "ao", "float8wo"),
    "ao-int8dyn": (False, "ao", "int8dyn"),
    "ao-float8dyn-row": (False, "ao", "float8dyn-row"),
    "ao-int4wo-intx-g32": (False, "ao", "int4wo-intx-g32"),
    "ao-int8dyn-int4-g32": (False, "ao", "int8dyn-int4-g32"),
    "ao-int8wo-g64": (False, "ao", "int8wo-g64"),
}


def quantize(dense: Path, target: Path, kind: str, arguments: Any) -> dict[str, torch.Tensor]:
    """Write one checkpoint; return the weights that torchao decodes, while they are in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config, TorchAoConfig
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    if kind == "fp8":
        FineGrainedFP8HfQuantizer.validate_environment = lambda *_, **__: None
        config: Any = FineGrainedFP8Config(**arguments)
    else:
        config = TorchAoConfig(torchao_config(arguments))
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(dense).save_pretrained(target)
    if kind == "fp8":
        return {}
    return {
        f"{name}.weight": module.weight.dequantize().detach().clone().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight.data) is not torch.Tensor and name != "lm_head"
    }


def fp8_decode(source: Path) -> dict[str, torch.Tensor]:
    """Decode a fine-grained FP8 file with the function that transformers loads it with, in float32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    with safe_open(source / "model.safetensors", "pt") as file:
        return {
            key: Fp8Dequantize(None)._dequantize_one(
                file.get_tensor(key), file.get_tensor(f"{key}_scale_inv"), output_dtype=torch.float32
            )
            for key in file.keys()  # noqa: SIM118 - not a mapping
            if f"{key}_scale_inv" in file.keys()  # noqa: SIM118
            and file.get_slice(key).get_dtype() == "F8_E4M3"  # else left dense, and its scales never written to
        }


def main() -> None:
    """Make every checkpoint named, or all of them."""
    dense, out = (Path(a).resolve() for a in sys.argv[1:3])
    small = first_layers(dense, out / "ckpt" / "dense-4l", 4)
    narrow = cropped(small, out / "ckpt" / "dense-4l-h512", 512)
    (out / "decompressed").mkdir(parents=True, exist_ok=True)
    failed = []
    for name in sys.argv[3:] or SPECS:
        crop, kind, arguments = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        try:
            decoded = quantize(narrow if crop else small, partial, kind, arguments) or fp8_decode(partial)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        if decoded:
            save_file(decoded, out / "decompressed" / f"{name}.safetensors")
        partial.rename(target)
        with safe_open(target / "model.safetensors", "pt") as file:
            metadata = file.metadata() or {}
        about = {k: v for k, v in metadata.items() if "." not in k or k == "model.layers.1.mlp.down_proj.weight"}
        dtypes = sorted({str(t.dtype) for t in decoded.values()})
        index_line(out, target, f"4 layers; decoded {dtypes}, {len(decoded)} layers; {time.time() - start:.0f} s")
        print("metadata:", json.dumps(about)[:1500], "files:", sorted(p.name for p in target.iterdir()), flush=True)
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
