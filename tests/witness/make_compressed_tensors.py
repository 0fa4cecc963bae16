"""
Write compressed-tensors checkpoints with llm-compressor, and what compressed-tensors itself decodes them to.

    python3 -m venv /tmp/witness/venvs/ct
    echo torch==2.13.0 > /tmp/witness/constraints.txt
    /tmp/witness/venvs/ct/bin/pip install torch==2.13.0
    /tmp/witness/venvs/ct/bin/pip install -c /tmp/witness/constraints.txt llmcompressor==0.14.0.1
    /tmp/witness/venvs/ct/bin/pip install --no-deps compressed-tensors==0.20.0   # 0.14.0.1 pins 0.19.0; both work
    OMP_NUM_THREADS=2 /tmp/witness/venvs/ct/bin/python tests/witness/make_compressed_tensors.py \
        .cache/demo/smollm2-135m-bf16 /tmp/witness examples/demo/calibration.txt [NAME ...]

Checkpoints go to OUT/ckpt/NAME, the tool's decoded weights to OUT/decompressed/NAME.safetensors (the tool's functions
fed float32 scales) and NAME.native.safetensors (exactly what the tool returns: BF16).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import calibration_windows, first_layers, index_line
from safetensors import safe_open
from safetensors.torch import save_file

INT = {"type": "int", "symmetric": True, "dynamic": False}
FLOAT = {"type": "float", "symmetric": True, "dynamic": False}
W4G64 = {**INT, "num_bits": 4, "strategy": "group", "group_size": 64}
INT8_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
FP8_CHANNEL = {**FLOAT, "num_bits": 8, "strategy": "channel"}
FP8_TENSOR = {**FLOAT, "num_bits": 8, "strategy": "tensor"}
ATTENTION = [r"re:.*self_attn\.[qkvo]_proj$"]
MLP = [r"re:.*mlp\.(gate|up|down)_proj$"]
FULL = 30


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, targets: list[str] | None = None) -> dict:
    """Return one config group."""
    return {"targets": targets or ["Linear"], "weights": weights, "input_activations": inputs}


# name: (layers, modifier, its arguments). A string stands for llm-compressor's preset of that name.
SPECS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ct-w4a16-asym-g64": (FULL, "rtn", {"config_groups": {"group_0": group({**W4G64, "symmetric": False})}}),
    "ct-w4a16-sym-g64-gptq-actweight": (
        4,
        "gptq",
        {"config_groups": {"group_0": group({**W4G64, "actorder": "weight"})}},
    ),
    "ct-fp8-block": (FULL, "rtn", {"scheme": "FP8_BLOCK"}),
    "ct-mxfp8": (FULL, "rtn", {"scheme": "MXFP8"}),
    "ct-nvfp4a16": (FULL, "rtn", {"scheme": "NVFP4A16"}),
    "ct-w8a8-int8": (4, "rtn", {"scheme": "W8A8"}),
    "ct-w8a16-int8-channel": (
        4,
        "rtn",
        {"config_groups": {"group_0": group({**INT, "num_bits": 8, "strategy": "channel"})}},
    ),
    "ct-w4a8-g64": (4, "rtn", {"config_groups": {"group_0": group(W4G64, INT8_TOKEN)}}),
    "ct-fp8-dynamic": (4, "rtn", {"scheme": "FP8_DYNAMIC"}),
    "ct-fp8-static": (4, "rtn+data", {"scheme": "FP8"}),
    "ct-mxfp4a16": (4, "rtn", {"scheme": "MXFP4A16"}),
    "ct-mxfp4": (4, "rtn", {"scheme": "MXFP4"}),
    "ct-nvfp4": (4, "rtn+data", {"scheme": "NVFP4"}),
    "ct-mixed-fp8attn-w4a16mlp": (
        4,
        "rtn",
        {
            "config_groups": {
                "group_0": group(FP8_CHANNEL, FP8_TOKEN, ATTENTION),
                "group_1": group(W4G64, None, MLP),
            }
        },
    ),
    "ct-fp8-dynamic-kvcache-fp8": (4, "rtn+data", {"scheme": "FP8_DYNAMIC", "kv_cache_scheme": FP8_TENSOR}),
    # Not asked for, and cheap.
    "ct-w8a8-static-asym": (
        4,
        "rtn+data",
        {
            "config_groups": {
                "group_0": group(
                    {**INT, "num_bits": 8, "strategy": "channel"},
                    {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False},
                )
            }
        },
    ),
    "ct-w8a16-asym-channel": (
        4,
        "rtn",
        {"config_groups": {"group_0": group({**INT, "num_bits": 8, "strategy": "channel", "symmetric": False})}},
    ),
    "ct-w3a16-asym-g64": (
        4,
        "rtn",
        {"config_groups": {"group_0": group({**W4G64, "num_bits": 3, "symmetric": False})}},
    ),
    "ct-w4a16-tensor-asym": (
        4,
        "rtn",
        {"config_groups": {"group_0": group({**INT, "num_bits": 4, "strategy": "tensor", "symmetric": False})}},
    ),
    "ct-w4afp8-g64": (4, "rtn", {"config_groups": {"group_0": group(W4G64, FP8_TOKEN)}}),
    "ct-mxfp8a16": (4, "rtn", {"scheme": "MXFP8A16"}),
    "ct-fp8-weightonly": (4, "rtn", {"config_groups": {"group_0": group(FP8_CHANNEL)}}),
    "ct-two-groups-prefix": (
        4,
        "rtn",
        {
            "config_groups": {
                "group_0": group({**W4G64, "num_bits": 8}, None, [r"re:.*down_proj$"]),
                "group_1": group(W4G64, None, ["Linear"]),
            }
        },
    ),
}


def quantize(dense: Path, target: Path, text: Path, kind: str, arguments: dict[str, Any]) -> None:
    """Write one checkpoint the way llm-compressor's examples do."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    modifier = (GPTQModifier if kind == "gptq" else QuantizationModifier)(ignore=["lm_head"], **arguments)
    data: dict[str, Any] = {}
    if kind != "rtn":
        windows = calibration_windows(tokenizer, text, 512)
        rows = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows]
        data = {
            "dataset": Dataset.from_list(rows),
            "max_seq_length": 512,
            "num_calibration_samples": len(rows),
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, tokenizer=tokenizer, recipe=[modifier], **data)
    model.save_pretrained(target, save_compressed=True)
    tokenizer.save_pretrained(target)


def decode_module(local: dict[str, torch.Tensor], scheme: Any, form: str, widen: bool) -> torch.Tensor:
    """
    Decode the tensors of one module with compressed-tensors.

    `widen` hands its functions float32 scales, since they compute in the dtype of the scale.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if widen and local["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        local = {**local, "weight_scale": local["weight_scale"].float()}
    compressor = BaseCompressor.get_value_from_registry(form)
    if widen and "weight_packed" in local and form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        rows, columns = local["weight_packed"].shape
        weight = dequantize(
            x_q=unpack_fp4_from_uint8(local["weight_packed"], rows, columns * 2, dtype=torch.float32),
            scale=compressor._decompress_scale(local["weight_scale"], torch.float32),
            args=scheme.weights,
            global_scale=local.get("weight_global_scale"),
            dtype=torch.float32,
        )
    else:
        weight = compressor.decompress(dict(local), scheme)["weight"]
    return weight.detach().contiguous()


def decompress(source: Path, widen: bool) -> dict[str, torch.Tensor]:
    """Decode every quantized layer with compressed-tensors."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoConfig, AutoModelForCausalLM

    written = json.loads((source / "config.json").read_text())["quantization_config"]
    known = set(QuantizationConfig.model_fields)
    config = QuantizationConfig.model_validate({k: v for k, v in written.items() if k in known})
    plain = AutoConfig.from_pretrained(source)
    del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    apply_quantization_config(model, config)

    decoded: dict[str, torch.Tensor] = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is None or scheme.weights is None:
                continue
            local = {k[len(name) + 1 :]: file.get_tensor(k) for k in stored if k.rpartition(".")[0] == name}
            if "weight_scale" not in local:  # auto-round names no `lm_head` to ignore, and stores none: it is tied
                continue
            form = str(getattr(scheme.format or infer_module_format(type(module), scheme), "value", scheme.format))
            decoded[f"{name}.weight"] = decode_module(local, scheme, form, widen)
    return decoded


def main() -> None:
    """Make every checkpoint named, or all of them."""
    dense, out, text = (Path(a).resolve() for a in sys.argv[1:4])
    small = first_layers(dense, out / "ckpt" / "dense-4l", 4)
    (out / "decompressed").mkdir(parents=True, exist_ok=True)
    failed = []
    for name in sys.argv[4:] or SPECS:
        layers, kind, arguments = SPECS[name]
        target, start = out / "ckpt" / name, time.time()
        if target.exists():
            continue
        partial = target.with_name(f".{name}.partial")
        try:
            quantize(dense if layers == FULL else small, partial, text, kind, arguments)
            wide, native = decompress(partial, widen=True), decompress(partial, widen=False)
        except Exception as error:  # noqa: BLE001 - a witness that fails must not stop the others
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[:1500], flush=True)
            continue
        save_file(wide, out / "decompressed" / f"{name}.safetensors")
        save_file(native, out / "decompressed" / f"{name}.native.safetensors")
        partial.rename(target)
        dtypes = sorted({str(t.dtype) for t in wide.values()})
        index_line(out, target, f"{layers} layers; decoded {dtypes}, native BF16; {time.time() - start:.0f} s")
    print("failed:", failed, flush=True)


if __name__ == "__main__":
    main()
