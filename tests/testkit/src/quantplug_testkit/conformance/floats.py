"""
Families of weights with floating-point codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.spec import PerBlock, PerChannel, PerTensor
from quantplug_testkit.conformance.hazard import Hazard, family, weight

if TYPE_CHECKING:
    from quantplug.spec import Granularity, WeightSpec


def _float8(granularity: Granularity | int, element: str = "float8_e4m3fn", *, act_order: bool = False) -> WeightSpec:
    return weight(element, granularity, act_order=act_order, scale_dtype="float32")


_MXFP8 = weight("float8_e4m3fn", 32, scale_dtype="float8_e8m0fnu")
_MXFP4 = weight("float4_e2m1fn", 32, scale_dtype="float8_e8m0fnu")
_NVFP4 = weight("float4_e2m1fn", 16, scale_dtype="float8_e4m3fn", global_scale=True)

FLOATS: tuple[Hazard, ...] = (
    # every 8-bit type; codes include both zeros, subnormals and the largest
    *(
        hazard
        for element in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
        for hazard in family(f"{element}-per-channel", 64, 128, _float8(PerChannel(), element))
    ),
    # one scale for everything, for groups, for blocks
    *family("float8-one-scale", 48, 96, _float8(PerTensor())),
    *family("float8-group", 64, 80, _float8(32)),
    *family("float8-act-order", 64, 128, _float8(32, act_order=True)),
    *family("float8-blocks", 64, 96, _float8(PerBlock(32, 32))),
    *family("float8-blocks-ragged", 33, 70, _float8(PerBlock(16, 32))),
    *family("float8-blocks-beyond-n-and-k", 24, 40, _float8(PerBlock(128, 128))),
    *family("float8-blocks-of-one-row", 20, 64, _float8(PerBlock(1, 16))),
    *family("tiles-float8-blocks", 256, 256, _float8(PerBlock(128, 128))),
    *family("tiles-float8-per-channel", 128, 256, _float8(PerChannel())),
    # scales of every dtype and size
    *family("float8-scales-in-bfloat16", 48, 64, weight("float8_e4m3fn", PerChannel(), scale_dtype="bfloat16")),
    *family("float8-scales-in-float16", 48, 64, weight("float8_e4m3fn", PerChannel())),
    *family("float8-scales-negative", 48, 64, _float8(PerChannel()), scales="negative"),
    *family("float8-scales-some-zero", 48, 64, _float8(PerBlock(16, 32)), scales="some zero"),
    *family("float8-scales-tiny", 48, 64, _float8(PerChannel()), scales="tiny"),
    *family("float8-scales-large", 48, 64, _float8(PerTensor()), scales="large"),
    # scales that are powers of two, from the very smallest on
    *family("mxfp8", 64, 128, _MXFP8),
    *family("mxfp8-scales-spread", 64, 128, _MXFP8, scales="spread"),
    *family("mxfp8-scales-tiny", 32, 64, _MXFP8, scales="tiny"),
    *family("mxfp8-scales-large", 32, 64, _MXFP8, scales="large"),
    *family("mxfp8-short-last-group", 33, 80, _MXFP8),
    *family("mxfp8-float8_e5m2", 32, 64, weight("float8_e5m2", 32, scale_dtype="float8_e8m0fnu")),
    *family("tiles-mxfp8", 128, 256, _MXFP8),
    # 4-bit codes
    *family("mxfp4", 64, 128, _MXFP4),
    *family("mxfp4-scales-spread", 64, 128, _MXFP4, scales="spread"),
    *family("mxfp4-scales-tiny", 32, 64, _MXFP4, scales="tiny"),
    *family("mxfp4-scales-large", 32, 64, _MXFP4, scales="large"),
    *family("mxfp4-odd-n-and-k", 31, 37, _MXFP4),
    *family("tiles-mxfp4", 128, 256, _MXFP4),
    *family("float4-scales-in-float16", 48, 64, weight("float4_e2m1fn", 32)),
    # scales of scales
    *family("nvfp4", 64, 128, _NVFP4),
    *family("nvfp4-scales-spread", 64, 128, _NVFP4, scales="spread"),
    *family("nvfp4-scales-tiny", 32, 64, _NVFP4, scales="tiny"),
    *family("nvfp4-scales-large", 32, 64, _NVFP4, scales="large"),
    *family("nvfp4-short-last-group", 33, 40, _NVFP4),
    *family("tiles-nvfp4", 128, 256, _NVFP4),
    # one input only, a sum long enough for a short accumulator to show
    *family("float8-one-input", 48, 1, _float8(PerChannel())),
    *family("nvfp4-one-input", 48, 1, _NVFP4),
    *family("float8-long-sum", 32, 1536, _float8(PerBlock(128, 128))),
    # bias
    *family("float8-bias", 33, 64, _float8(PerChannel()), bias=True),
    *family("nvfp4-bias", 64, 128, _NVFP4, bias=True),
    # fused layers: a scale each, blocks that are counted from each first row, different formats
    *family("fused-float8-one-scale-each", (64, 32, 32), 128, _float8(PerTensor())),
    *family("fused-float8-blocks", (40, 20, 5), 96, _float8(PerBlock(16, 32)), bias=True),
    *family("fused-mxfp4", (64, 32, 32), 128, _MXFP4),
    *family("fused-nvfp4", (64, 32, 32), 128, _NVFP4),
    *family(
        "fused-float8-different-granularities",
        (48, 32, 16),
        96,
        (_float8(PerTensor()), _float8(PerChannel()), _float8(PerBlock(16, 32))),
    ),
    *family(
        "fused-floats-and-integers",
        (48, 32, 16),
        96,
        (_NVFP4, _MXFP8, weight("uint4", 32, act_order=True)),
    ),
)
"""Every family of floating-point codes, in every dtype."""
