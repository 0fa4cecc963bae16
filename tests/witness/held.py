"""
What both comparisons hold against a tool: the distance of values, and our model of a checkpoint.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.policy import Policy

ROOM = 10.0
"""How many times the effect of random differences of the same size is taken to be explained by them."""


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Return the largest distance of two float32 tensors, counted in representable numbers."""
    places = [tensor.contiguous().view(torch.int32).to(torch.int64) for tensor in (ours, theirs)]
    ordered = [torch.where(bits < 0, -(bits & 0x7FFF_FFFF), bits) for bits in places]
    return int((ordered[0] - ordered[1]).abs().max())


def reference_only() -> Policy:
    """Return the wish that every layer runs on the reference kernel."""
    from quantplug.policy import Policy

    return Policy.parse({"rule": [{"pin": "reference"}]}, "compare")


def our_model(directory: Path) -> Any:
    """Load a checkpoint in float32 with every layer on the reference kernel."""
    from quantplug_transformers import from_pretrained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference kernel announces itself
        return from_pretrained(directory, dtype="float32", policy=reference_only())


SPLIT = "its experts' weights are split and their scales stacked, which its own tool cannot read either"
REFUSED = {
    "ar-autoround-mxint4": ("QP-CFG-REFUSED", "no scheme reads MXINT4"),
    "moe-ct-qwen3-partial-experts": ("QP-SKIP-SHARDS", "two of eight experts stay whole"),
    "moe-gq-qwen3-dynamic-left": ("QP-SKIP-SHARDS", "two of eight experts stay whole"),
    "moe-ar-gpt-oss-autoround-w4g64": ("QP-ST-SHAPE", "inputs were taken for outputs"),
    "moe-ct-glm4-fp8-block-free": ("QP-ST-DTYPE", "its embeddings are quantized"),
    "moe-hf-deepseek-v3-fp8-block128": ("QP-ST-MISSING", SPLIT),
    "moe-hf-deepseek-v3-fp8-block32": ("QP-ST-MISSING", SPLIT),
    "moe-hf-gemma4-fp8-block64": ("QP-ST-MISSING", "scales are called `scale`, and the router's was never written to"),
    "moe-hf-glm4-fp8-block128": ("QP-ST-MISSING", SPLIT),
    "moe-hf-mixtral-fp8-block128": ("QP-ST-MISSING", SPLIT),
    "moe-hf-qwen3-fp8-block128": ("QP-ST-MISSING", SPLIT),
    "moe-hf-qwen3-fp8-block128-ue8m0": ("QP-ST-MISSING", SPLIT),
    "moe-hf-qwen3-fp8-tensor": ("QP-ST-MISSING", SPLIT),
    "moe-mo-gpt-oss-mxfp4-wo": ("QP-ST-SHAPE", "its experts are grouped along their outputs"),
    "mo-int8-smoothquant": ("QP-ST-EXTRA", "inputs are multiplied by a stored scale"),
    "small-hf-mixtral-fp8-block32": ("QP-ST-MISSING", SPLIT),
}
"""Checkpoints that must be refused: the code, and what is wrong with them."""
