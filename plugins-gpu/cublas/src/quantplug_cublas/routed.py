"""
The router's choices in the order of the experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Routed(NamedTuple):
    """
    Where each of the M * T choices goes.

    Attributes:
        local: int32 `[M * T]`, the number of its expert, or E for nobody's.
        places: int32 `[M * T]`, its row among all choices, those of an expert together and nobody's last.
        ends: int32 `[turns * E]`, the row behind each group's last. With two turns, the groups of the second follow
            right behind those of the first, nobody's rows left out.
    """

    local: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
