"""
Synthetic GPTQ checkpoints: the bytes are random, everything about them is valid.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_gptq(
    directory: Path,
    layers: Mapping[str, tuple[int, int]],
    *,
    bits: int = 4,
    group_size: int = 64,
    act_order: bool = False,
) -> int:
    """
    Write a checkpoint of symmetric linear layers and return its bytes of tensor data.

    Args:
        directory: where to; it exists.
        layers: (N, K) by module path.
        bits: 2, 4 or 8.
        group_size: inputs per scale, -1 for one group.
        act_order: whether inputs belong to groups in random order.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for path, (n, k) in layers.items():
        size = k if group_size == -1 else group_size
        order = torch.randperm(k, generator=generator) if act_order else torch.arange(k)
        words = torch.randint(-(2**31), 2**31, (k * bits // 32, n), dtype=torch.int64, generator=generator)
        # The stored zero point is one less than the middle code, in every field.
        stored = sum(((1 << (bits - 1)) - 1) << shift for shift in range(0, 32, bits))
        tensors |= {
            f"{path}.qweight": words.to(torch.int32),
            f"{path}.qzeros": torch.full((k // size, n * bits // 32), stored, dtype=torch.int32),
            f"{path}.scales": (torch.rand(k // size, n, generator=generator) * 0.01 + 0.01).to(torch.float16),
            f"{path}.g_idx": (order // size).to(torch.int32),
        }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": True}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return sum(tensor.nbytes for tensor in tensors.values())
