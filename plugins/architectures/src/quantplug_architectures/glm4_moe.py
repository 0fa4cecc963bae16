"""
GLM-4 as a mixture of experts (GLM-4.5, 4.6, 4.7).

The layer after the last one drafts the next token but one: `embed_tokens`, `enorm`, `hnorm`, `eh_proj`,
`shared_head.head` and `shared_head.norm` beside a whole layer with experts.
"""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, ExpertRules
from quantplug.names import Architecture
from quantplug_architectures.spellings import STACKED

GLM4_MOE = Architecture(
    "glm4_moe",
    ("glm4_moe",),
    layer_heads=("shared_head.head",),
    experts=ExpertRules(("mlp.experts",), (PER_EXPERT, STACKED), count=("n_routed_experts",), shared="shared_experts"),
)
