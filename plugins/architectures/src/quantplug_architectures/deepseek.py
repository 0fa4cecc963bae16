"""
DeepSeek V2 and V3, and models that are laid out like them.

The layer after the last one drafts the next token but one: it has an `embed_tokens` and a `shared_head.head` of its
own, onto the same vocabulary.
"""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, ExpertRules
from quantplug.names import Architecture
from quantplug_architectures.spellings import STACKED

DEEPSEEK = Architecture(
    "deepseek",
    ("deepseek_v2", "deepseek_v3", "kimi_k2"),
    layer_heads=("shared_head.head",),
    fused=(
        ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),  # as vLLM calls it; the next as SGLang does
        ("fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    ),
    experts=ExpertRules(("mlp.experts",), (PER_EXPERT, STACKED), count=("n_routed_experts",), shared="shared_experts"),
)
