"""
Stored tensors for the tests, packed by the oracle and not by the code under test, and the golden files.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantplug.config import QuantConfig, RawConfig
from quantplug.spec import LinearShape, PerGroup, PerTensor
from quantplug_compressed_tensors.dialect import CompressedTensorsDialect
from quantplug_compressed_tensors.scheme import PackScheme
from quantplug_testkit.oracles import compressed_tensors as oracle

GOLDEN = Path(__file__).parent / "golden"
WHERE = "config.json: quantization_config"


@dataclass
class Layer:
    """One stored layer."""

    scheme: PackScheme
    shape: LinearShape
    tensors: dict[str, torch.Tensor]

    def values(self) -> np.ndarray:
        """Return what the oracle reads from the tensors, float64 `[N, K]`."""
        arrays = {name: tensor.double().numpy() for name, tensor in self.tensors.items() if name == "weight_scale"}
        arrays |= {name: tensor.numpy() for name, tensor in self.tensors.items() if name != "weight_scale"}
        granularity = self.scheme.granularity
        return oracle.dequantize(
            arrays["weight_packed"],
            arrays["weight_scale"],
            arrays.get("weight_zero_point"),
            arrays.get("weight_g_idx"),
            bits=self.scheme.bits,
            count=self.shape.in_features,
            group_size=granularity.size if isinstance(granularity, PerGroup) else self.shape.in_features,
        )


def build(**params: object) -> PackScheme:
    return PackScheme.build(params, "test")


def stored_layer(scheme: PackScheme, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Layer:
    """Return a random layer as a file of that scheme stores it."""
    random = np.random.default_rng(seed)
    half = 1 << (scheme.bits - 1)
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else k
    groups = -(-k // size)
    whole = isinstance(scheme.granularity, PerTensor)
    tensors = {
        "weight_packed": oracle.pack_rows(random.integers(-half, half, (n, k)), scheme.bits),
        "weight_shape": np.array([n, k], np.int64),
    }
    if not scheme.symmetric:
        zeros = random.integers(-half, half, (1, 1) if whole else (n, groups))
        tensors["weight_zero_point"] = (
            zeros.reshape(1).astype(np.int8) if whole else oracle.pack_rows(zeros.T, scheme.bits).T.copy()
        )
    if scheme.actorder == "group":
        g_idx = (np.arange(k) // size).astype(np.int32)
        random.shuffle(g_idx)
        tensors["weight_g_idx"] = g_idx
    stored = {name: torch.from_numpy(array) for name, array in tensors.items()}
    scales = random.standard_normal((1,) if whole else (n, groups)) * 0.1
    stored["weight_scale"] = torch.from_numpy(scales).to(dtype)
    if scheme.activation is not None and not scheme.activation.dynamic:
        stored["input_scale"] = torch.tensor([0.0625], dtype=dtype)
        if not scheme.activation.element.signed:
            stored["input_zero_point"] = torch.tensor([-3], dtype=torch.int8)
    return Layer(scheme, LinearShape(n, k), stored)


def read(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def tensor(spelled: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=getattr(torch, spelled["dtype"])).view(spelled["shape"])


def parse(fields: dict, *, method: str = "compressed-tensors") -> QuantConfig:
    """Read a section as if it stood in config.json."""
    origins = {key: f"{WHERE}.{key}" for key in fields}
    return CompressedTensorsDialect().parse(RawConfig(method, fields, origins, {}, WHERE))


def group(targets: list[str], form: str | None = None, inputs: dict | None = None, **weights: object) -> dict:
    """Return a group of a configuration."""
    found: dict[str, object] = {"targets": targets, "weights": {"num_bits": 4, "type": "int", **weights}}
    if form is not None:
        found["format"] = form
    if inputs is not None:
        found["input_activations"] = inputs
    return found


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
NV = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
MX4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


def section(*groups: dict, **fields: object) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{number}": item for number, item in enumerate(groups)},
        **fields,
    }


def one(inputs: dict | None = None, form: str | None = None, **weights: object) -> dict:
    return section(group(["Linear"], form, inputs, **weights))
