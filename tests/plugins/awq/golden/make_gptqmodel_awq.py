"""
Write the golden files with GPTQModel itself, on a CPU, in a minute or two.

    python make_gptqmodel_awq.py OUT [case ...]

The environment, and the tiny model with its calibration data, are those of ../../gptq/golden/make_gptqmodel.py.
OUT/golden/<case>.json has the same form: the tensors exactly as GPTQModel wrote them, the configuration as written,
every tensor's name, dtype and shape, and GPTQModel's own dequantized weight `[N, K]`: `dequantize_gemm` of the stored
tensors with float16 scales, transposed. Of a layer the first 32 output rows are kept.

`gemv-*` are layers alone, since GPTQModel quantizes to that layout on GPUs only: chosen codes, zero points and scales,
packed by the layer's own `pack`, and `(code - zero) * scale` of what was chosen, in float16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "gptq" / "golden"))

import gptqmodel
import make_gptqmodel as tiny
import torch
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import AWQConfig
from safetensors import safe_open

CASES = {
    "gemm-w4g64-asym": ({"bits": 4, "group_size": 64, "sym": False}, [tiny.DOWN]),
    "gemm-w4g32-sym": ({"bits": 4, "group_size": 32, "sym": True}, [tiny.KEY]),
    "gemm-w4chan-asym": ({"bits": 4, "group_size": -1, "sym": False}, [tiny.KEY]),
    "gemm-w4g64-asym-dynamic": (
        {"bits": 4, "group_size": 64, "sym": False, "dynamic": {r"-:.*\.k_proj": {}}},
        [tiny.DOWN],
    ),
}
GEMV = {"gemv-w4g64": (64, 192), "gemv-w4g128": (128, 256)}  # group size, inputs
ROWS = 64


def quantized(case: str, out: Path) -> dict[str, object]:
    """Quantize, save, and return what the golden file of one case holds."""
    arguments, kept = CASES[case]
    dense, checkpoint = out / "dense", out / "checkpoint" / case
    if not dense.exists():
        tiny.dense_model(dense, {})
    torch.manual_seed(0)
    model = GPTQModel.load(str(dense), AWQConfig(**arguments, offload_to_disk=False), device="cpu")
    model.quantize(tiny.calibration(), batch_size=8)
    model.save(str(checkpoint))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = {}
    for layer in kept:
        stored = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        inputs, outputs = stored["qweight"].shape[0], stored["scales"].shape[1]
        size = inputs if arguments["group_size"] == -1 else arguments["group_size"]
        weight = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].half(), 4, size)
        layers[layer] = {
            "tensors": {suffix: tiny.spell(tiny.cut(suffix, tensor, outputs)) for suffix, tensor in stored.items()},
            "dequantized": tiny.spell(weight.half().T[: tiny.ROWS]),
        }
    return {
        "arguments": arguments,
        "config": {
            "quantization_config": json.loads((checkpoint / "config.json").read_text())["quantization_config"],
            "quantize_config.json": json.loads((checkpoint / "quantize_config.json").read_text()),
        },
        "stored": {name: [tiny.NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()},
        "layers": layers,
    }


def packed(case: str) -> dict[str, object]:
    """Pack chosen numbers in GEMV's layout."""
    size, inputs = GEMV[case]
    generator = torch.Generator().manual_seed(3)
    groups = inputs // size
    codes = torch.randint(0, 16, (ROWS, inputs), generator=generator)
    zeros = torch.randint(0, 16, (ROWS, groups), generator=generator)
    scales = (torch.rand(ROWS, groups, generator=generator) + 0.5).half()
    group = torch.arange(inputs) // size
    values = (codes - zeros[:, group]) * scales.double()[:, group]
    linear = torch.nn.Linear(inputs, ROWS, bias=False, dtype=torch.float64)
    linear.weight.data = values
    layer = AwqGEMVLinear(4, size, False, False, inputs, ROWS)
    layer.pack(linear, scales.double(), zeros.double())
    stored = {suffix: getattr(layer, suffix)[: tiny.ROWS] for suffix in ("qweight", "qzeros", "scales")}
    return {
        "arguments": {"bits": 4, "group_size": size, "version": "gemv"},
        "layers": {
            "layer": {
                "tensors": {suffix: tiny.spell(tensor) for suffix, tensor in stored.items()},
                "dequantized": tiny.spell(values[: tiny.ROWS].half()),
            }
        },
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "golden").mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or [*CASES, *GEMV]:
        maker = {"tool": "gptqmodel", "version": gptqmodel.__version__, "torch": torch.__version__}
        maker["command"] = f"python make_gptqmodel_awq.py OUT {name}"
        body = packed(name) if name in GEMV else quantized(name, target)
        path = target / "golden" / f"{name}.json"
        path.write_text(json.dumps({"maker": maker, **body}, indent=1) + "\n")
        print(name, path.stat().st_size, "bytes")
