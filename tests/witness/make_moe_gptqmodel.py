"""
Write mixtures of experts with GPTQModel, and what GPTQModel itself decodes each expert to.

The environment is that of make_gptqmodel.py; the dense models are those of moe_models.py.

    GPTQMODEL_CPU_WORKERS=2 OMP_NUM_THREADS=1 /tmp/witness/venvs/gq/bin/python tests/witness/make_moe_gptqmodel.py \
        /tmp/witness [NAME ...]

Checkpoints go to OUT/ckpt/NAME, the decoded weights to OUT/decompressed/NAME.safetensors (float32: its plain torch
layers given the file's scales in float32) under the names in the checkpoint, facts about it to OUT/facts/NAME.json.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from make_gptqmodel import decode
from moe_common import calibration, record
from safetensors.torch import save_file

W4 = {"bits": 4, "group_size": 128, "sym": True, "desc_act": True}
AWQ = {"bits": 4, "group_size": 128, "method": "awq", "format": "gemm"}
FP8 = {"bits": 8, "method": "fp8", "format": "float8_e4m3fn"}
LEFT = r"-:.*layers\.1\.mlp\.experts\.[67]\..*"

# By name: the family, and the arguments of the tool's configuration.
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "moe-gq-qwen3-w4g128-actorder": ("qwen3-moe", W4),
    "moe-gq-mixtral-w4g128": ("mixtral", {**W4, "desc_act": False}),
    "moe-gq-qwen3-dynamic-left": ("qwen3-moe", {**W4, "dynamic": {LEFT: {}}}),
    "moe-gq-qwen3-dynamic-layer-left": ("qwen3-moe", {**W4, "dynamic": {r"-:.*layers\.1\.mlp\.experts\..*": {}}}),
    "moe-gq-qwen3-dynamic-group32": (
        "qwen3-moe",
        {**W4, "desc_act": False, "dynamic": {r"+:.*experts\.[0-3]\..*": {"group_size": 32}}},
    ),
    "moe-gq-qwen3-dynamic-bits8": (
        "qwen3-moe",
        {**W4, "desc_act": False, "dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 32}}},
    ),
    "moe-gq-qwen3-w4g128-asym": ("qwen3-moe", {**W4, "sym": False, "desc_act": False}),
    "moe-gq-deepseek-v3-w4g32": ("deepseek-v3", {**W4, "group_size": 32, "desc_act": False}),
    "moe-gq-glm4-w4g128": ("glm4-moe", {**W4, "desc_act": False}),
    "moe-gq-gpt-oss-w4g128": ("gpt-oss", {**W4, "desc_act": False}),
    "moe-gq-gemma4-w4g128": ("gemma4", {**W4, "desc_act": False}),
    "moe-gq-qwen3-awq-w4g128": ("qwen3-moe", {**AWQ, "sym": False}),
    "moe-gq-mixtral-awq-w4g128": ("mixtral", {**AWQ, "sym": False}),
    "moe-gq-qwen3-fp8-row": ("qwen3-moe", {**FP8, "weight_scale_method": "row"}),
    "moe-gq-qwen3-fp8-block128": ("qwen3-moe", {**FP8, "weight_block_size": [128, 128]}),
}

SMALL = {"bits": 4, "group_size": 32}
SPECS |= {
    "small-gq-qwen3-w4g32-actorder": ("qwen3-moe-small", {**SMALL, "sym": True, "desc_act": True}),
    "small-gq-mixtral-w4g32-asym": ("mixtral-small", {**SMALL, "sym": False, "desc_act": False}),
}
"""As above, in models small enough to be kept with the tests."""


def quantize(dense: Path, target: Path, arguments: dict[str, Any]) -> None:
    """Write one checkpoint the way GPTQModel's examples do."""
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    data = [{"input_ids": numbers, "attention_mask": [1] * len(numbers)} for numbers in calibration()]
    model = GPTQModel.load(str(dense), QuantizeConfig(**arguments, offload_to_disk=False), device="cpu")
    model.quantize(None if arguments.get("method") == "fp8" else data, batch_size=8)
    model.save(str(target))


def main() -> None:
    """Make every checkpoint named, or all of them."""
    out = Path(sys.argv[1]).resolve()
    failed = []
    for name in sys.argv[2:] or SPECS:
        family, arguments = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            quantize(out / "ckpt" / f"dense-moe-{family}", partial, dict(arguments))
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        note = f"{time.time() - start:.0f} s"
        try:
            decoded = decode(partial)
            save_file(decoded, out / "decompressed" / f"{name}.safetensors")
        except Exception as error:  # noqa: BLE001 - the file is a witness even where its tool cannot read it
            note += f"; NOT decoded: {type(error).__name__}: {error}"[:400]
        partial.rename(target)
        record(out, name, family, note)
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
