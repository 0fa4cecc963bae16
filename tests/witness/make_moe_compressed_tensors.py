"""
Write mixtures of experts with llm-compressor, and what compressed-tensors itself decodes each expert to.

The environment is that of make_compressed_tensors.py; the dense models are those of moe_models.py. Loading experts one
by one makes transformers look into every module it has, some of which import torchvision, whose wheel does not go with
torch's CPU wheel; nothing here computes with it, so what fails to import is emptied:

    /tmp/witness/venvs/ct/bin/pip install --no-deps torchvision==0.28.0
    : > /tmp/witness/venvs/ct/lib/python3.11/site-packages/torchvision/_meta_registrations.py
    OMP_NUM_THREADS=1 /tmp/witness/venvs/ct/bin/python tests/witness/make_moe_compressed_tensors.py \
        /tmp/witness [NAME ...]

Checkpoints go to OUT/ckpt/NAME, the tool's decoded weights to OUT/decompressed/NAME.safetensors (its functions given
the file's scales in float32) under the names in the checkpoint, and what the files hold to OUT/facts/NAME.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from make_compressed_tensors import FP8_CHANNEL, FP8_TOKEN, INT, decode_module, group
from moe_common import calibration, modules, record, stored
from moe_models import WORDS
from safetensors.torch import save_file

W4 = {**INT, "num_bits": 4, "strategy": "group"}
EXPERTS, ATTENTION = [r"re:.*\.experts\.\d+\..*_proj$"], [r"re:.*self_attn\..*_proj$"]
ROUTERS = ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*router.*"]
GROUP_32 = {"config_groups": {"group_0": group({**W4, "group_size": 32})}}

# name: (family, how, arguments of the modifier). A string stands for llm-compressor's preset of that name.
SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "moe-ct-qwen3-w4a16-g128": ("qwen3-moe", "rtn", {"scheme": "W4A16"}),
    "moe-ct-qwen3-w4a16-asym-g128": ("qwen3-moe", "rtn", {"scheme": "W4A16_ASYM"}),
    "moe-ct-qwen3-fp8-dynamic": ("qwen3-moe", "rtn", {"scheme": "FP8_DYNAMIC"}),
    "moe-ct-qwen3-fp8-block": ("qwen3-moe", "rtn", {"scheme": "FP8_BLOCK"}),
    "moe-ct-qwen3-mxfp8": ("qwen3-moe", "rtn", {"scheme": "MXFP8"}),
    "moe-ct-qwen3-mxfp4a16": ("qwen3-moe", "rtn", {"scheme": "MXFP4A16"}),
    "moe-ct-qwen3-nvfp4a16": ("qwen3-moe", "rtn", {"scheme": "NVFP4A16"}),
    "moe-ct-qwen3-w8a8-int8": ("qwen3-moe", "rtn", {"scheme": "W8A8"}),
    "moe-ct-mixtral-w4a16-g128": ("mixtral", "rtn", {"scheme": "W4A16"}),
    "moe-ct-deepseek-v3-fp8-block": ("deepseek-v3", "rtn", {"scheme": "FP8_BLOCK"}),
    "moe-ct-glm4-fp8-block": ("glm4-moe", "rtn", {"scheme": "FP8_BLOCK"}),
    "moe-ct-gpt-oss-mxfp4a16": ("gpt-oss", "rtn", {"scheme": "MXFP4A16"}),
    "moe-ct-gemma4-w4a16-g128": ("gemma4", "rtn", {"scheme": "W4A16"}),
    "moe-ct-qwen3-w4a16-gptq-actweight": (
        "qwen3-moe",
        "gptq",
        {"config_groups": {"group_0": group({**W4, "group_size": 128, "actorder": "weight"})}},
    ),
    "moe-ct-qwen3-fp8-static": ("qwen3-moe", "rtn+data", {"scheme": "FP8"}),
    "moe-ct-qwen3-nvfp4": ("qwen3-moe", "rtn+data", {"scheme": "NVFP4"}),
    "moe-ct-qwen3-mixed": (
        "qwen3-moe",
        "rtn",
        {
            "config_groups": {
                "group_0": group(FP8_CHANNEL, FP8_TOKEN, ATTENTION),
                "group_1": group({**W4, "group_size": 32}, None, EXPERTS),
            }
        },
    ),
    "moe-ct-qwen3-partial-experts": (
        "qwen3-moe",
        "rtn",
        {"scheme": "FP8_DYNAMIC", "ignore": [*ROUTERS, r"re:.*layers\.1\.mlp\.experts\.[67]\..*"]},
    ),
    "moe-ct-qwen3-layer-left": (
        "qwen3-moe",
        "rtn",
        {"scheme": "MXFP8", "ignore": [*ROUTERS, r"re:.*layers\.1\..*"]},
    ),
    "moe-ct-mixtral-fp8-dynamic": ("mixtral", "rtn", {"scheme": "FP8_DYNAMIC"}),
    "moe-ct-mixtral-nvfp4a16": ("mixtral", "rtn", {"scheme": "NVFP4A16"}),
    "moe-ct-deepseek-v3-w4a16-g32": ("deepseek-v3", "rtn", GROUP_32),
    "moe-ct-deepseek-v3-mxfp8": ("deepseek-v3", "rtn", {"scheme": "MXFP8"}),
    "moe-ct-glm4-w4a16-g128": ("glm4-moe", "rtn", {"scheme": "W4A16"}),
    "moe-ct-glm4-fp8-block-free": ("glm4-moe", "free", {"scheme": "FP8_BLOCK"}),
    "moe-ct-glm4-fp8-block-nextn": (
        "glm4-moe",
        "free",
        {"scheme": "FP8_BLOCK", "ignore": [*ROUTERS, r"re:.*embed_tokens$", r"re:.*shared_head\..*", r"re:.*eh_proj$"]},
    ),
    "moe-ct-gpt-oss-w4a16-g128": ("gpt-oss", "rtn", {"scheme": "W4A16"}),
    "moe-ct-gemma4-fp8-dynamic": ("gemma4", "rtn", {"scheme": "FP8_DYNAMIC"}),
    "moe-ct-gemma4-nvfp4a16": ("gemma4", "rtn", {"scheme": "NVFP4A16"}),
}

G32_ASYM = {"config_groups": {"group_0": group({**W4, "group_size": 32, "symmetric": False})}}
SPECS |= {
    "small-ct-qwen3-w4a16-asym-g32": ("qwen3-moe-small", "rtn", G32_ASYM),
    "small-ct-qwen3-w8a8-int8": ("qwen3-moe-small", "rtn", {"scheme": "W8A8"}),
    "small-ct-qwen3-fp8-block": ("qwen3-moe-small", "rtn", {"scheme": "FP8_BLOCK"}),
    "small-ct-qwen3-mxfp8": ("qwen3-moe-small", "rtn", {"scheme": "MXFP8"}),
    "small-ct-qwen3-nvfp4": ("qwen3-moe-small", "rtn+data", {"scheme": "NVFP4"}),
    "small-ct-mixtral-w4a16-g32": ("mixtral-small", "rtn", GROUP_32),
    "small-ct-gpt-oss-mxfp4a16": ("gpt-oss-small", "rtn", {"scheme": "MXFP4A16"}),
    "small-ct-gemma4-w4a16-g32": ("gemma4-small", "rtn", GROUP_32),
}
"""As above, in models small enough to be kept with the tests."""


def quantize(dense: Path, target: Path, how: str, arguments: dict[str, Any]) -> None:
    """Write one checkpoint the way llm-compressor's examples for mixtures of experts do."""
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = {"ignore": ROUTERS, **arguments}
    if how == "free":
        from llmcompressor import model_free_ptq

        model_free_ptq(str(dense), str(target), device="cpu", max_workers=1, **arguments)
        return
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    modifier = (GPTQModifier if how == "gptq" else QuantizationModifier)(**arguments)
    data: dict[str, Any] = {}
    if how != "rtn":
        from datasets import Dataset

        rows = [{"input_ids": numbers, "attention_mask": [1] * len(numbers)} for numbers in calibration()]
        data = {
            "dataset": Dataset.from_list(rows),
            "max_seq_length": WORDS,
            "num_calibration_samples": len(rows),
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(dense), recipe=[modifier], **data)
    model.save_pretrained(target, save_compressed=True)
    AutoTokenizer.from_pretrained(dense).save_pretrained(target)


def decode(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Decode every module that has a scale; which group it belongs to is for compressed-tensors' own matcher to say."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    written = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    known = set(QuantizationConfig.model_fields)
    config = QuantizationConfig.model_validate({k: v for k, v in written.items() if k in known})
    linear = torch.nn.Linear(1, 1, device="meta")
    decoded = {}
    for name, local in modules(stored(checkpoint)).items():
        if "weight_scale" not in local:
            continue
        schemes = [s for s in config.config_groups.values() if is_match(name, linear, s.targets, config.ignore)]
        if len(schemes) != 1:
            raise ValueError(f"{name} has a scale and {len(schemes)} groups")
        form = schemes[0].format or config.format
        parts = {part: tensor for part, tensor in local.items() if part != "bias"}
        decoded[f"{name}.weight"] = decode_module(parts, schemes[0], str(getattr(form, "value", form)), widen=True)
    return decoded


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
            quantize(out / "ckpt" / f"dense-moe-{family}", partial, how, arguments)
            save_file(decode(partial), out / "decompressed" / f"{name}.safetensors")
            partial.rename(target)
            record(out, name, family, f"{time.time() - start:.0f} s")
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
