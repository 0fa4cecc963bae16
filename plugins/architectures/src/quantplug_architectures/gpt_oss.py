"""
gpt-oss: experts with biases, a clamped function, and rows of gate and up that alternate.

The released files hold `experts.gate_up_proj_blocks` `[E, 2I, H/32, 16]` with `_scales` and `_bias` in MXFP4; dense
ones `experts.gate_up_proj` `[E, H, 2I]`, inputs first. llm-compressor 0.14 and GPTQModel 7.7 store each expert's
projections apart, outputs first, halves named and not alternating. A joined projection of one expert is no spelling of
this family: its order could not be told.
"""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, Ending, ExpertRules, stacked
from quantplug.moe import ExpertFunction
from quantplug.names import Architecture

MXFP4 = stacked(
    Ending("_blocks", "weight_packed", flattened=True),
    Ending("_scales", "weight_scale"),
    Ending("_bias", "bias"),
    order="interleaved",
)
DENSE = stacked(Ending("", "weight", transposed=True), Ending("_bias", "bias"), order="interleaved")

GPT_OSS = Architecture(
    "gpt_oss",
    ("gpt_oss",),
    routers=("mlp.router",),
    experts=ExpertRules(
        ("mlp.experts",),
        (PER_EXPERT, MXFP4, DENSE),
        function=ExpertFunction("silu", limit=7.0, alpha=1.702, up_offset=1.0),
        function_field="",
        limit_field="swiglu_limit",
        alpha_field="swiglu_alpha",
    ),
)
