"""
Gemma 4: experts beside the dense `mlp` of a layer, and layers whose values are their keys.

Where `attention_k_eq_v` holds, full-attention layers store no `v_proj`: the output of `k_proj` is used for both.
"""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, ExpertRules
from quantplug.moe import ExpertFunction
from quantplug.names import Architecture
from quantplug_architectures.spellings import STACKED

GEMMA4 = Architecture(
    "gemma4",
    ("gemma4", "gemma4_text"),
    embeddings=("embed_tokens", "embed_tokens_per_layer"),
    absent=(("v_proj", "k_proj"),),
    routers=("router", "router.proj"),
    experts=ExpertRules(
        ("experts",),
        (PER_EXPERT, STACKED),
        count=("num_experts",),
        top_k=("top_k_experts",),
        function=ExpertFunction("gelu_tanh"),
        function_field="hidden_activation",
    ),
)
