"""
humming's own choice of a kernel, by the number of rows.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from quantplug_humming.prepare import layer_config

if TYPE_CHECKING:
    from quantplug_humming.form import Form


class Choice(NamedTuple):
    """
    A kernel.

    Attributes:
        tuning: as humming takes it.
        rows: of x that are multiplied together.
    """

    tuning: str
    rows: int


@cache
def choose(form: Form, bias: bool, experts: int, rows: int, device: int) -> Choice:
    """
    Return humming's choice; only what is used is compiled.

    Args:
        form: of the weight.
        bias: whether there is one.
        experts: E, whose rows are indexed; 0 for a linear layer.
        rows: of x, or of all experts together.
        device: index of the GPU.
    """
    from humming.tune import get_heuristics_class, get_heuristics_config

    config = layer_config(form, bias=bias, experts=experts)
    # Near numbers get the kernel of one of them, so that fewer are compiled.
    near = get_heuristics_class(device).get_shape_m_sample(config, rows)
    kernel = dict(
        get_heuristics_config(config, shape_m=near, gemm_type="indexed" if experts else "dense", device=device)
    )
    if experts:
        # What routing wrote is read before a kernel launched early would wait for it.
        kernel["use_pdl"] = False
    return Choice(json.dumps(kernel), kernel["block_shape"][0])
