"""
The experts among what a tool decoded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
ONE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
ALL = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


def by_expert(
    decoded: Mapping[str, torch.Tensor], *, interleaved: bool
) -> dict[str, dict[int, dict[str, torch.Tensor]]]:
    """
    Return what a tool decoded by container, expert and projection ("gate_proj", "up_proj", "down_proj").

    Args:
        decoded: tensors by name in the file.
        interleaved: whether stacked experts are gpt-oss': `[in, out]`, gates in even columns.
    """
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in decoded.items():
        if match := ONE.fullmatch(name):
            experts = found.setdefault(match[1], {})
            experts.setdefault(int(match[2]), {})[PROJECTIONS.get(match[3], match[3])] = tensor
        elif match := ALL.fullmatch(name):
            for expert, whole in enumerate(tensor):
                rows = whole.T if interleaved else whole
                halves = (rows[0::2], rows[1::2]) if interleaved else rows.chunk(2)
                parts = {"gate_proj": halves[0], "up_proj": halves[1]}
                if match[2] == "down_proj":
                    parts = {"down_proj": rows}
                found.setdefault(match[1], {}).setdefault(expert, {}).update(parts)
    return found


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    return bool(ONE.fullmatch(name) or ALL.fullmatch(name))
