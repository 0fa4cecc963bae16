"""
humming's own choice of a kernel, by the number of rows.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from quantplug_humming.prepare import layer_config

if TYPE_CHECKING:
    from quantplug_humming.form import Form


_LARGE: dict[bool, tuple[tuple[int, dict[str, Any]], ...]] = {
    False: (
        (512, {"block_shape": (160, 256, 128), "warp_shape": (160, 32, 128), "smem_reuse_mode": "all_stages"}),
        (192, {"block_shape": (128, 256, 128), "warp_shape": (128, 32, 128), "num_stages": 3}),
    ),
    True: ((512, {"block_shape": (160, 128, 128), "warp_shape": (160, 16, 128)}),),
}
"""
What is faster than humming's own choice for x in float8_e4m3fn from so many rows of an expert on, by whether sums are
promoted, for which they are held twice in registers: see README.md. So many rows fill the GPU without cutting sums.
"""


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
        kernel |= _large(form, rows // experts, kernel)
        # What routing wrote is read before a kernel launched early would wait for it.
        kernel["use_pdl"] = False
    return Choice(json.dumps(kernel), kernel["block_shape"][0])


def _large(form: Form, rows: int, kernel: dict[str, Any]) -> dict[str, Any]:
    """Return what a larger block changes, if there is one for so many rows of an expert."""
    seeks = form.float8 and not form.block and kernel.get("use_warp_spec", False)
    if not seeks or tuple(kernel["block_shape"][1:]) != (256, 128):
        return {}
    found = next((changes for least, changes in _LARGE[bool(form.promoted)] if rows >= least), None)
    return {} if found is None else {"num_stages": 4, "smem_reuse_mode": "none", "use_stream_k": False, **found}
