"""
Golden files, and checkpoints made of them.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantplug.config import RawConfig
from quantplug.policy import Policy
from quantplug_torchao.dialect import TorchaoDialect
from quantplug_torchao.scheme import TorchaoScheme

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {
    "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16,
    "F32": torch.float32,
}  # fmt: skip
WHERE = "config.json: quantization_config"
FORMS = json.loads((GOLDEN / "forms.json").read_text())
WITNESS = json.loads((GOLDEN / "smollm2.json").read_text())
CASES = FORMS["cases"]
# The reference kernel keeps the canonical form, so that values are those of the format and of no kernel.
REFERENCE = Policy.parse({"rule": [{"pin": "reference"}]}, "test")


def tensor(spelled: dict) -> torch.Tensor:
    data = zlib.decompress(base64.b64decode(spelled["data"]))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(DTYPES[spelled["dtype"]]).view(spelled["shape"])


def tensors(case: dict) -> dict[str, torch.Tensor]:
    return {name: tensor(spelled) for name, spelled in case["tensors"].items()}


def section(case: dict) -> dict:
    return {"quant_method": "torchao", "quant_type": case["quant_type"]}


def write(directory: Path, stored: dict[str, torch.Tensor], metadata: dict[str, str], quantization: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(stored, directory / "model.safetensors", {**metadata, "format": "pt"})
    (directory / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": quantization}))
    return directory


def parse(fields: dict):
    raw = RawConfig("torchao", fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE)
    return TorchaoDialect().parse(raw)


def parse_type(value: object):
    return parse({"quant_method": "torchao", "quant_type": {"default": value}})


def build(**params: object) -> TorchaoScheme:
    return TorchaoScheme.build(params, "test")
