"""
Ways in which tools store experts that several families share.
"""

from __future__ import annotations

from quantplug.expertrules import Ending, stacked

STACKED = stacked(Ending("", "weight"), Ending("_scale_inv", "weight_scale_inv"))
"""
`experts.gate_up_proj` `[E, 2I, H]`, the rows of gate first, and `experts.down_proj` `[E, H, I]`, as Transformers 5 has
them in memory and writes them with `save_original_format=False`; in FP8 with `…_scale_inv`.
"""
