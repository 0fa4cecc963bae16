"""
Write the golden files with compressed-tensors itself, on a CPU, in seconds.

    python make_int8.py OUT [WITNESS]

OUT/ct-*.json: small random layers, compressed and decompressed by compressed-tensors' own functions, for every strategy
of `int-quantized`, symmetric and not, 8 and 4 bits. With WITNESS, the directory that
tests/witness/make_compressed_tensors.py filled, also OUT/smollm2-*.json: the first rows of one layer of checkpoints
that llm-compressor wrote from SmolLM2-135M-Instruct, with its configuration, and what compressed-tensors decodes that
layer to (fed float32 scales, and as it is, in bfloat16).

A tensor is `{"dtype", "shape", "data"}`, the data in base64, little-endian and row-major. The environment, of its own:

    pip install torch==2.13.0        (the CPU build)
    pip install llmcompressor==0.14.0.1 && pip install --no-deps compressed-tensors==0.20.0
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open

NAMES = {
    torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip
N, K, GROUP = 12, 96, 32
CASES = {
    f"ct-w{bits}-{strategy}-{'sym' if symmetric else 'asym'}": (bits, strategy, symmetric)
    for bits in (8, 4)
    for strategy in ("tensor", "channel", "group")
    for symmetric in (True, False)
}
WITNESSES = ("ct-w8a8-int8", "ct-w8a8-static-asym", "ct-w4a8-g64", "ct-w4afp8-g64")
LAYER, ROWS = "model.layers.0.self_attn.k_proj", 4


def spell(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def write(out: Path, name: str, document: dict[str, object], command: str) -> None:
    """Write one file, with what made it."""
    maker = {"tool": "compressed-tensors", "version": compressed_tensors.__version__, "torch": torch.__version__}
    (out / f"{name}.json").write_text(json.dumps({"maker": {**maker, "command": command}, **document}, indent=1) + "\n")


def random_layer(out: Path, name: str) -> None:
    """Compress a random layer and decompress it again."""
    bits, strategy, symmetric = CASES[name]
    dense = (torch.randn(N, K, generator=torch.Generator().manual_seed(11)) * 0.02 + 0.005).to(torch.bfloat16)
    args = QuantizationArgs(
        num_bits=bits, type="int", strategy=strategy, symmetric=symmetric,
        group_size=GROUP if strategy == "group" else None,
    )  # fmt: skip
    parts = {"tensor": dense.reshape(1, -1), "channel": dense, "group": dense.reshape(N, K // GROUP, GROUP)}[strategy]
    keep = strategy != "group"
    scale, zero = calculate_qparams(parts.amin(-1, keepdim=keep), parts.amax(-1, keepdim=keep), args)
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    )
    state = {"weight": dense, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
    stored = IntQuantizationCompressor.compress(state, scheme)
    exact = IntQuantizationCompressor.decompress({**stored, "weight_scale": stored["weight_scale"].float()}, scheme)
    own = IntQuantizationCompressor.decompress(stored, scheme)
    document = {
        "weights": args.model_dump(include={"num_bits", "strategy", "symmetric", "group_size"}, mode="json"),
        "input_activations": None,
        "dense": spell(dense),
        "tensors": {suffix: spell(tensor) for suffix, tensor in stored.items()},
        "dequantized": spell(exact["weight"]),
        "native": spell(own["weight"]),
    }
    write(out, name, document, f"python make_int8.py OUT  # {name}")


def extract(out: Path, witness: Path, name: str) -> None:
    """Cut the first rows out of a layer of a checkpoint."""
    config = json.loads((witness / "ckpt" / name / "config.json").read_text())["quantization_config"]
    with safe_open(witness / "ckpt" / name / "model.safetensors", "pt") as file:
        stored = {
            key.removeprefix(f"{LAYER}."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 - not a mapping
            if key.startswith(f"{LAYER}.")
        }
    values = {}
    for part in ("", ".native"):
        with safe_open(witness / "decompressed" / f"{name}{part}.safetensors", "pt") as file:
            values[part] = file.get_tensor(f"{LAYER}.weight")[:ROWS]
    group = config["config_groups"]["group_0"]
    document = {
        "weights": {key: group["weights"][key] for key in ("num_bits", "strategy", "symmetric", "group_size")},
        "input_activations": group["input_activations"],
        "layer": LAYER,
        "tensors": {
            suffix: spell(tensor if suffix.startswith("input") else tensor[:ROWS]) for suffix, tensor in stored.items()
        },
        "dequantized": spell(values[""]),
        "native": spell(values[".native"]),
    }
    write(
        out, name.replace("ct-", "smollm2-"), document,
        f"python tests/witness/make_compressed_tensors.py .cache/demo/smollm2-135m-bf16 WITNESS "
        f"examples/demo/calibration.txt {name}, then python make_int8.py OUT WITNESS",
    )  # fmt: skip


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for case in CASES:
        random_layer(target, case)
    for case in WITNESSES if len(sys.argv) > 2 else ():
        extract(target, Path(sys.argv[2]), case)
