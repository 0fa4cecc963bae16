"""
gpt-oss: experts with biases, a clamped function, and rows of gate and up that alternate.

The released files hold `experts.gate_up_proj_blocks` `[E, 2I, H/32, 16]` with `_scales` and `_bias` in MXFP4; dense
ones `experts.gate_up_proj` `[E, H, 2I]`, inputs first. ModelOpt 0.47 keeps that order in NVFP4: `[E, H/2, 2I]` with
`_weight_scale` `[E, H/16, 2I]`, and one `_weight_scale_2` and `_input_scale` for all experts of a layer.

llm-compressor 0.14 and GPTQModel 7.7 store each expert's projections apart, outputs first, halves named and not
alternating. A joined projection of one expert is no spelling of this family: its order could not be told.
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
AS_IN_MEMORY = stacked(
    Ending("", "weight", transposed=True),
    Ending("_bias", "bias"),
    Ending("_weight_scale", "weight_scale", transposed=True),
    Ending("_weight_scale_2", "weight_scale_2", common=True),
    Ending("_input_scale", "input_scale", common=True),
    order="interleaved",
)

GPT_OSS = Architecture(
    "gpt_oss",
    ("gpt_oss",),
    routers=("mlp.router",),
    experts=ExpertRules(
        ("mlp.experts",),
        (PER_EXPERT, MXFP4, AS_IN_MEMORY),
        function=ExpertFunction("silu", limit=7.0, alpha=1.702, up_offset=1.0),
        function_field="",
        limit_field="swiglu_limit",
        alpha_field="swiglu_alpha",
    ),
)
