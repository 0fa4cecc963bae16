"""
Write the golden files with auto-round itself, on a CPU, in a minute or two.

    python make_autoround.py OUT DENSE [case ...]

DENSE is the dense model that GPTQModel's maker (../../gptq/golden/make_gptqmodel.py) leaves in OUT/dense; any directory
with the same layer names will do. OUT/golden/<case>.json has the same form as GPTQModel's; its dequantized weight
`[N, K]` is what auto-round's own QuantLinear multiplies with, got by running it on the identity in float16. It is built
from the file's tensors rather than by auto-round's loader, which has no CPU kernel for asymmetric files.

The environment, of its own:

    pip install torch==2.13.0        (the CPU build)
    pip install auto-round==0.16.1 transformers==5.23.0 safetensors==0.8.0
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import auto_round
import torch
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 32
DOWN = "model.layers.0.mlp.down_proj"  # N = 128, K = 192
KEY = "model.layers.0.self_attn.k_proj"  # N = 64, K = 128
NAMES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}
WHOLE = {KEY: {"bits": 16}}
MIXED = {KEY: {"bits": 16}, DOWN: {"bits": 8, "group_size": 32}}

# case -> (format, arguments of AutoRound, layers to keep); "auto_round" with 4 bits and sym false becomes AWQ's layout
# where one width serves all layers
CASES = {
    "ar-w4g64-sym": ("auto_round", {"bits": 4, "group_size": 64, "sym": True}, [KEY]),
    "ar-w4g64-asym-autogptq": ("auto_round:auto_gptq", {"bits": 4, "group_size": 64, "sym": False}, [KEY]),
    "ar-w4g64-asym-gptqmodel": ("auto_round:gptqmodel", {"bits": 4, "group_size": 64, "sym": False}, [KEY]),
    "ar-w3g64-asym-plain": ("auto_round", {"bits": 3, "group_size": 64, "sym": False}, [KEY]),
    "ar-w3g64-asym-autogptq": ("auto_round:auto_gptq", {"bits": 3, "group_size": 64, "sym": False}, [KEY]),
    "ar-w2g32-sym": ("auto_round", {"bits": 2, "group_size": 32, "sym": True}, [KEY]),
    "ar-w8g64-sym": ("auto_round", {"bits": 8, "group_size": 64, "sym": True}, [KEY]),
    "ar-w4g64-sym-mixed": ("auto_round", {"bits": 4, "group_size": 64, "sym": True, "layer_config": MIXED}, [DOWN]),
    "ar-w4g64-asym-awq": ("auto_round", {"bits": 4, "group_size": 64, "sym": False}, [DOWN]),
    "ar-w4g64-asym-awq-mixed": (
        "auto_round:auto_awq",
        {"bits": 4, "group_size": 64, "sym": False, "layer_config": WHOLE},
        [DOWN],
    ),
    "ar-awq-w4g32-asym": ("auto_awq", {"bits": 4, "group_size": 32, "sym": False}, [KEY]),
    "ar-awq-w4g64-sym": ("auto_awq", {"bits": 4, "group_size": 64, "sym": True}, [KEY]),
    "ar-awq-w4chan-asym-mixed": (
        "auto_awq",
        {"bits": 4, "group_size": -1, "sym": False, "layer_config": WHOLE},
        [DOWN],
    ),
    "ar-gptq-w4g64-sym": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": True}, [KEY]),
    "ar-gptq-w4g64-asym": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": False}, [KEY]),
    "ar-gptq-w4g64-sym-mixed": ("auto_gptq", {"bits": 4, "group_size": 64, "sym": True, "layer_config": MIXED}, [DOWN]),
}


def calibration() -> list[dict[str, torch.Tensor]]:
    """Return random sequences, always the same."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(1, 96, dtype=torch.long)
    return [
        {"input_ids": torch.randint(3, 128, (1, 96), generator=generator), "attention_mask": mask} for _ in range(32)
    ]


def own_weight(stored: dict[str, torch.Tensor], packing: str) -> torch.Tensor:
    """Return what auto-round's own layer multiplies with, `[N, K]` in float16."""
    if "awq" in packing:
        (inputs, words), groups = stored["qweight"].shape, len(stored["scales"])
        if stored["scales"].shape[1] != 8 * words:
            raise ValueError("auto-round wrote another layout")
        return dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], 4, inputs // groups).T
    raw = "gptqmodel" in packing or "gptq" not in packing  # zero points as they are, else less one
    groups, outputs = stored["scales"].shape
    bits = stored["qzeros"].shape[1] * 32 // outputs
    inputs = stored["qweight"].shape[0] * 32 // bits
    if "g_idx" in stored:  # always the trivial one; its branch of the layer fails for N > K, so leave it out
        trivial = torch.arange(inputs) // (inputs // groups)
        if not torch.equal(stored["g_idx"].long(), trivial):
            raise ValueError("auto-round wrote another order")
    layer = (qlinear_torch if raw else qlinear_torch_zp).QuantLinear(
        bits, inputs // groups, inputs, outputs, bias=False
    )
    layer.load_state_dict({suffix: stored[suffix] for suffix in ("qweight", "qzeros", "scales")})
    with torch.inference_mode():
        return layer(torch.eye(inputs, dtype=torch.float16)).T


def spell(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def cut(suffix: str, tensor: torch.Tensor, outputs: int) -> torch.Tensor:
    """Keep the first rows of a layer; stored tensors have them along their last axis, packed in `qzeros`."""
    if suffix == "g_idx":
        return tensor
    return tensor[..., : tensor.shape[-1] * ROWS // outputs]


def make(case: str, out: Path, dense: Path) -> None:
    """Quantize, save, and write the golden file of one case."""
    form, arguments, kept = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    tuner = auto_round.AutoRound(
        model,
        AutoTokenizer.from_pretrained(dense),
        dataset=calibration(),
        nsamples=32,
        seqlen=96,
        iters=20,
        batch_size=8,
        device_map="cpu",
        seed=42,
        **arguments,
    )
    tuner.quantize_and_save(output_dir=str(out / "checkpoint" / case), format=form)
    checkpoint = next((out / "checkpoint" / case).rglob("config.json")).parent
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = {}
    for layer in kept:
        stored = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        outputs = stored["scales"].shape[1]
        layers[layer] = {
            "tensors": {suffix: spell(cut(suffix, tensor, outputs)) for suffix, tensor in stored.items()},
            "dequantized": spell(own_weight(stored, config.get("packing_format", config["quant_method"]))[:ROWS]),
        }
    document = {
        "maker": {
            "tool": "auto-round",
            "version": auto_round.__version__,
            "torch": torch.__version__,
            "command": f"python make_autoround.py OUT DENSE {case}",
            "format": form,
            "arguments": arguments,
        },
        "config": {
            "quantization_config": config,
            "quantization_config.json": json.loads((checkpoint / "quantization_config.json").read_text()),
            "safetensors_metadata": metadata,
        },
        "stored": {name: [NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()},
        "layers": layers,
    }
    path = out / "golden" / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(case, path.stat().st_size, "bytes")


if __name__ == "__main__":
    for name in sys.argv[3:] or CASES:
        make(name, Path(sys.argv[1]), Path(sys.argv[2]))
