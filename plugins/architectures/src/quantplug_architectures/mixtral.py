"""
Mixtral, whose experts come in three spellings.

`block_sparse_moe.experts.E.w1`, `w3`, `w2` (gate, up, down) in the released files and Transformers' own;
`block_sparse_moe.experts.E.gate_proj`, … by llm-compressor 0.14; `mlp.experts.E.gate_proj`, … by GPTQModel 7.7.
"""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, W123, ExpertRules
from quantplug.names import Architecture
from quantplug.renames import NameMap, Rename
from quantplug_architectures.spellings import STACKED

MIXTRAL = Architecture(
    "mixtral",
    ("mixtral",),
    experts=ExpertRules(("block_sparse_moe.experts", "mlp.experts"), (W123, PER_EXPERT, STACKED)),
    renames=NameMap((Rename("block_sparse_moe", "mlp"),)),
)
