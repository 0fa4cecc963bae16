"""
Quantize one small layer with every configuration of torchao that this plugin reads, and write down what comes out.

    python make_torchao.py OUT

in the environment of tests/witness/make_transformers.py (torchao 0.18.0, transformers 5.23.0, torch 2.13.0 on the CPU).
OUT/forms.json then holds, for each configuration: itself as Transformers writes it into config.json, tensors and
description as torchao's own `flatten_tensor_state_dict` makes them, and what the weight dequantizes to, in bfloat16
and, where the class can, in float32.

FP8 activations are only allowed on GPUs, though quantizing the weight is plain torch: that one check is switched off.
Rows repeat, so that the file stays small.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from pathlib import Path

import torch
from torchao import quantization as ao
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import quant_api
from torchao.quantization.granularity import PerBlock
from transformers import TorchAoConfig

NAMES = {
    torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bfloat16: "BF16",
    torch.float32: "F32",
}  # fmt: skip
Symmetry, Algorithm = ao.MappingType, quant_api.IntxChooseQParamsAlgorithm
BLOCKS = [PerBlock([1, 128]), PerBlock([128, 128])]

INT8, INT8_DYNAMIC = ao.Int8WeightOnlyConfig, ao.Int8DynamicActivationInt8WeightConfig
INTX, INTX_DYNAMIC = ao.IntxWeightOnlyConfig, ao.Int8DynamicActivationIntxWeightConfig
FLOAT8, FLOAT8_DYNAMIC = ao.Float8WeightOnlyConfig, ao.Float8DynamicActivationFloat8WeightConfig
GROUP, ROW, TENSOR = ao.PerGroup(32), ao.PerRow(), ao.PerTensor()

CASES = {
    "int8": INT8(),
    "int8-tensor": INT8(granularity=TENSOR),
    "int8-group": INT8(granularity=GROUP),
    "int8-dynamic": INT8_DYNAMIC(),
    "int8-dynamic-tensor": INT8_DYNAMIC(granularity=TENSOR),
    "int8-dynamic-tensor-row": INT8_DYNAMIC(granularity=[TENSOR, ROW]),
    "int8-dynamic-asym": INT8_DYNAMIC(act_mapping_type=Symmetry.ASYMMETRIC),
    "int8-dynamic-reduced": INT8_DYNAMIC(reduce_range=True),
    **{f"int{bits}-group": INTX(weight_dtype=getattr(torch, f"int{bits}"), granularity=GROUP) for bits in range(1, 8)},
    **{
        f"int{bits}-axis-asym": INTX(weight_dtype=getattr(torch, f"int{bits}"), mapping_type=Symmetry.ASYMMETRIC)
        for bits in (1, 2, 3, 4, 6, 8)
    },
    "int4-group-asym": INTX(weight_dtype=torch.int4, granularity=GROUP, mapping_type=Symmetry.ASYMMETRIC),
    "int4-no-clipping": INTX(weight_dtype=torch.int4, mapping_type=Symmetry.SYMMETRIC_NO_CLIPPING_ERR),
    "int4-hqq": INTX(
        weight_dtype=torch.int4, granularity=GROUP, intx_choose_qparams_algorithm=Algorithm.HQQ_SCALE_ONLY
    ),
    "int4-float32-scales": INTX(weight_dtype=torch.int4, granularity=GROUP, scale_dtype=torch.float32),
    "int4-dynamic": INTX_DYNAMIC(weight_dtype=torch.int4),
    "int4-dynamic-asym": INTX_DYNAMIC(weight_dtype=torch.int4, weight_mapping_type=Symmetry.ASYMMETRIC),
    "int8-intx-dynamic": INTX_DYNAMIC(weight_granularity=ao.PerAxis(0)),
    "float8": FLOAT8(),
    "float8-e5m2": FLOAT8(weight_dtype=torch.float8_e5m2),
    "float8-tensor": FLOAT8(granularity=TENSOR),
    "float8-group": FLOAT8(granularity=GROUP),
    "float8-dynamic": FLOAT8_DYNAMIC(),
    "float8-dynamic-row": FLOAT8_DYNAMIC(granularity=ROW),
    "float8-dynamic-bounded": FLOAT8_DYNAMIC(granularity=ROW, activation_value_ub=1200.0),
    "float8-dynamic-block": FLOAT8_DYNAMIC(granularity=BLOCKS),
}


def spell(tensor: torch.Tensor) -> dict[str, object]:
    """Return a tensor as JSON."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": base64.b64encode(zlib.compress(data, 9)).decode(),
    }


def quantized(config: object, n: int, k: int) -> torch.nn.Module:
    """Return a model of one layer; rows repeat, and the third one is far from symmetric."""
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16))
    rows = torch.randn(4, k, generator=torch.Generator().manual_seed(11))
    rows[2] += 2
    model.layer.weight.data = rows.repeat(n // 4, 1).to(torch.bfloat16)
    ao.quantize_(model, config)
    return model


def main(out: Path) -> None:
    """Write the file."""
    quant_api._check_hardware_support = lambda *_: None
    cases = {}
    for name, config in CASES.items():
        size = (128, 128) if name.endswith("-block") else (16, 64)
        model = quantized(config, *size)
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        weight = model.layer.weight
        wide = None if type(weight).__name__ == "IntxUnpackedToInt8Tensor" else spell(weight.dequantize(torch.float32))
        cases[name] = {
            "quant_type": TorchAoConfig(config).to_dict()["quant_type"],
            "tensors": {key: spell(tensor) for key, tensor in tensors.items()},
            "metadata": metadata,
            "dequantized": {"bfloat16": spell(weight.dequantize()), "float32": wide},
        }
    mixed = ao.FqnToConfig({
        "model.layers.0.mlp.up_proj.weight": CASES["int8"],
        "model.layers.0.mlp.down_proj": CASES["float8"],
        r"re:model\.layers\..*\.o_proj\.weight": CASES["int4-group"],
        r"re:model\.layers\.1\..*": None,
        "_default": CASES["int4-dynamic"],
    })  # fmt: skip
    document = {
        "maker": {"tool": "torchao", "version": "0.18.0", "command": "python make_torchao.py OUT"},
        "mixed": TorchAoConfig(mixed, modules_to_not_convert=["lm_head"]).to_dict(),
        "cases": cases,
    }
    (out / "forms.json").write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
