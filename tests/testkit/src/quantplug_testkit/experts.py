"""
From an expert's canonical weights to the oracle's plain numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_testkit.canonical import segment_of, to_float64
from quantplug_testkit.oracles.experts import Expert, Stored

if TYPE_CHECKING:
    from quantplug.expertweights import ExpertWeights
    from quantplug.weight import ActivationParams


def expert_of(weights: ExpertWeights) -> Expert:
    """Return an expert as plain numbers; every conversion is exact."""
    return Expert(
        tuple(segment_of(weight) for weight in weights.w13),
        segment_of(weights.w2),
        to_float64(torch.cat(weights.b13)) if weights.b13 else None,
        None if weights.b2 is None else to_float64(weights.b2),
        tuple(_stored(params) for params in weights.a13),
        _stored(weights.a2),
    )


def _stored(params: ActivationParams | None) -> Stored:
    if params is None:
        return Stored()
    return Stored(
        None if params.scale is None else float(params.scale),
        0 if params.zero is None else int(params.zero),
        1.0 if params.global_scale is None else float(params.global_scale),
    )
