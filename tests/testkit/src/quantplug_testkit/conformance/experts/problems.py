"""
The fixed, public catalogue of layers of experts that kernels are tried on, each named after what goes wrong there.

A kernel is tried on those that its own `supports` accepts: claiming less in the test means being chosen less often.
"""

from __future__ import annotations

from dataclasses import replace

from quantplug.activations import read_activation
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.spec import PerBlock, PerChannel, PerTensor
from quantplug_testkit.conformance.experts.hazard import ExpertHazard, family
from quantplug_testkit.conformance.hazard import weight

_INT4 = weight("int4", 32)
_UINT4 = weight("uint4", 32)
_INT8 = weight("int8", PerChannel(), scale_dtype="float32")
_FLOAT8 = weight("float8_e4m3fn", PerChannel(), scale_dtype="float32")
_FLOAT8_ONE_SCALE = weight("float8_e4m3fn", PerTensor(), scale_dtype="float32")
_FLOAT8_BLOCKS = weight("float8_e4m3fn", PerBlock(128, 128), scale_dtype="float32")
_MXFP8 = weight("float8_e4m3fn", 32, scale_dtype="float8_e8m0fnu")
_MXFP4 = weight("float4_e2m1fn", 32, scale_dtype="float8_e8m0fnu")
_NVFP4 = weight("float4_e2m1fn", 16, scale_dtype="float8_e4m3fn", global_scale=True)
_ACT_ORDER = weight("uint4", 32, act_order=True)

_NO_GATE = ExpertFunction(gated=False)
_RELU = ExpertFunction("relu", gated=False)
_SWIGLUOAI = ExpertFunction("silu", limit=7.0, alpha=1.702, up_offset=1.0)

EXPERT_CATALOGUE: tuple[ExpertHazard, ...] = (
    # element types, and what shares a scale; every expert and projection has its own
    *family("int4", _INT4),
    *family("uint4", _UINT4),
    *family("uint2", weight("uint2", 32)),
    *family("uint3", weight("uint3", 32)),
    *family("uint8", weight("uint8", 32)),
    *family("int8", _INT8),
    *family("int8-one-scale", weight("int8", PerTensor(), scale_dtype="float32")),
    *family("float8", _FLOAT8),
    *family("float8-one-scale", _FLOAT8_ONE_SCALE),
    *family("float8-blocks-ragged", weight("float8_e4m3fn", PerBlock(32, 32), scale_dtype="float32"), hidden=96,
            intermediate=40),
    *family("mxfp8", _MXFP8),
    *family("mxfp4", _MXFP4),
    *family("nvfp4", _NVFP4),
    *family("scales-in-bfloat16", weight("uint4", 32, scale_dtype="bfloat16")),
    *family("scales-spread", _INT4, scales="spread"),
    *family("zeros-highest", _UINT4, zeros="highest"),
    # act-order, one permutation for each projection of each expert
    *family("act-order", _ACT_ORDER),
    *family("act-order-bias", weight("int4", 16, act_order=True), experts=2, bias=True),
    # sizes that no tile fits, and those that tiled kernels like best
    *family("odd-h-and-i", weight("uint4", 16), hidden=37, intermediate=19),
    *family("odd-h-and-i-bias", _INT8, hidden=61, intermediate=33, bias=True),
    *family("short-last-groups", _UINT4, hidden=80, intermediate=48),
    *family("one-between", _INT8, hidden=24, intermediate=1),
    *family("one-hidden", _INT8, hidden=1, intermediate=20),
    *family("tiles-int4-group128", weight("int4", 128), hidden=256, intermediate=128),
    *family("tiles-uint4-group64", weight("uint4", 64), hidden=256, intermediate=128),
    *family("tiles-int8", _INT8, hidden=256, intermediate=128),
    *family("tiles-float8", _FLOAT8, hidden=256, intermediate=128),
    *family("tiles-float8-blocks", _FLOAT8_BLOCKS, hidden=256, intermediate=128),
    *family("tiles-mxfp8", _MXFP8, hidden=256, intermediate=128),
    *family("tiles-mxfp4", _MXFP4, hidden=256, intermediate=128),
    *family("tiles-nvfp4", _NVFP4, hidden=256, intermediate=128),
    # numbers of experts, and of those that a row takes
    *family("one-expert", _INT4, experts=1, top_k=1),
    *family("one-of-four", _INT8, top_k=1),
    *family("all-of-three", _INT4, experts=3, top_k=3),
    *family("three-of-eight", _UINT4, experts=8, top_k=3),
    *family("four-of-forty", _INT8, experts=40, top_k=4, hidden=16, intermediate=8),
    *family("weight-on-input", _INT4, top_k=1, weight_on_input=True),
    *family("weight-on-input-bias", _INT8, top_k=1, weight_on_input=True, bias=True),
    # what lies between the products
    *family("bias", _UINT4, bias=True),
    *family("no-gate", _INT8, function=_NO_GATE),
    *family("no-gate-bias", _INT4, function=_NO_GATE, bias=True),
    *family("gelu", _INT8, function=ExpertFunction("gelu")),
    *family("gelu-tanh", _INT8, function=ExpertFunction("gelu_tanh")),
    *family("gelu-tanh-no-gate", _INT4, function=ExpertFunction("gelu_tanh", gated=False)),
    *family("relu", _INT8, function=ExpertFunction("relu")),
    *family("relu2-no-gate", _INT8, function=ExpertFunction("relu2", gated=False)),
    *family("limit", _INT8, function=ExpertFunction(limit=1.0)),
    *family("alpha-and-offset", _INT8, function=ExpertFunction(alpha=1.702, up_offset=1.0)),
    *family("swigluoai", _MXFP4, function=_SWIGLUOAI, bias=True, reach=8.0),
    *family("swigluoai-int4", _INT4, function=_SWIGLUOAI, bias=True, reach=8.0),
    # nothing is rounded before experts are added up, so that how they are shows
    *family("exact-sums", _INT4, function=_RELU, top_k=4, exact=True),
    *family("exact-sums-mxfp4", _MXFP4, function=_RELU, top_k=4, exact=True),
    # projections of different formats
    *family("down-differs", _INT4, _INT8),
    *family("all-differ", (_INT4, weight("uint8", PerChannel())), weight("uint3", 48, act_order=True), hidden=96),
    # x and h may be quantized
    *family("x-int8", _INT8, activation="int8/token/dynamic"),
    *family("x-int8-bias-odd-h-and-i", _INT8, experts=2, hidden=61, intermediate=33, bias=True,
            activation="int8/token/dynamic"),
    *family("x-int8-static", _INT8, activation="int8/tensor/static"),
    *family("x-int8-tiles", _INT8, hidden=256, intermediate=128, activation="int8/token/dynamic"),
    *family("x-float8", _FLOAT8, activation="float8_e4m3fn/token/dynamic"),
    *family("x-float8-static", _FLOAT8_ONE_SCALE, activation="float8_e4m3fn/tensor/static"),
    *family("x-float8-tiles", _FLOAT8, hidden=256, intermediate=128, activation="float8_e4m3fn/token/dynamic"),
    *family("x-float8-groups-and-blocks", _FLOAT8_BLOCKS, hidden=256, intermediate=128,
            activation="float8_e4m3fn/group128/dynamic"),
    *family("x-mxfp8", _MXFP8, experts=2, activation="float8_e4m3fn/group32/dynamic/float8_e8m0fnu"),
    *family("x-mxfp8-mxfp4", _MXFP4, activation="float8_e4m3fn/group32/dynamic/float8_e8m0fnu"),
    *family("x-nvfp4", _NVFP4, activation="float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"),
)  # fmt: skip
"""Every family, in every dtype."""

_PLAIN = MoEProblem(8, 2, 128, 64, (_INT4, _INT4), _INT4, ExpertFunction(), "bfloat16")

UNUSUAL_EXPERTS: tuple[MoEProblem, ...] = (
    replace(_PLAIN, dtype="float64"),
    replace(_PLAIN, dtype="float8_e4m3fn"),
    replace(_PLAIN, dtype="int32"),
    replace(_PLAIN, experts=0),
    replace(_PLAIN, top_k=0),
    replace(_PLAIN, top_k=9),
    replace(_PLAIN, hidden=0),
    replace(_PLAIN, intermediate=0),
    replace(_PLAIN, hidden=2**20, intermediate=2**20, experts=2**12),
    replace(_PLAIN, hidden=7919, intermediate=7907),
    replace(_PLAIN, router_weight_on_input=True),
    replace(_PLAIN, activation=read_activation("int8/token/dynamic", "unusual")),
    replace(_PLAIN, activation=read_activation("int8/tensor/dynamic", "unusual")),
    replace(_PLAIN, activation=read_activation("float8_e4m3fn/group128/dynamic", "unusual")),
    replace(_PLAIN, w13=(_INT4,), function=ExpertFunction("relu2", gated=False, limit=1.0)),
    replace(_PLAIN, w2=weight("uint4", 32, scale_dtype="float8_e4m3fn")),
    replace(_PLAIN, function=ExpertFunction(alpha=0.0)),
)
"""Problems that a kernel is asked about and never has to run."""
