"""
Families of problems whose file permits to quantize x. A kernel may use that or not, and says so.
"""

from __future__ import annotations

from quantplug.spec import PerBlock, PerChannel, PerTensor
from quantplug_testkit.conformance.hazard import Hazard, family, weight

_INT8 = weight("int8", PerChannel(), scale_dtype="float32")
_FLOAT8 = weight("float8_e4m3fn", PerChannel(), scale_dtype="float32")
_FLOAT8_ONE_SCALE = weight("float8_e4m3fn", PerTensor(), scale_dtype="float32")
_FLOAT8_BLOCKS = weight("float8_e4m3fn", PerBlock(128, 128), scale_dtype="float32")
_MXFP8 = weight("float8_e4m3fn", 32, scale_dtype="float8_e8m0fnu")
_MXFP4 = weight("float4_e2m1fn", 32, scale_dtype="float8_e8m0fnu")
_NVFP4 = weight("float4_e2m1fn", 16, scale_dtype="float8_e4m3fn", global_scale=True)

_X_INT8 = "int8/token/dynamic"
_X_FLOAT8 = "float8_e4m3fn/token/dynamic"
_X_MXFP8 = "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"
_X_MXFP4 = "float4_e2m1fn/group32/dynamic/float8_e8m0fnu"
_X_NVFP4 = "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"

ACTIVATIONS: tuple[Hazard, ...] = (
    # 8-bit integers on both sides: sums that int32 holds exactly
    *family("x-int8", 64, 128, _INT8, activation=_X_INT8),
    *family("x-int8-tiles", 128, 256, _INT8, activation=_X_INT8),
    *family("x-int8-bias-odd-n-and-k", 33, 61, _INT8, activation=_X_INT8, bias=True),
    *family("x-int8-one-input", 48, 1, _INT8, activation=_X_INT8),
    *family("x-int8-long-sum", 32, 1536, _INT8, activation=_X_INT8),
    *family("x-int8-one-scale", 48, 96, weight("int8", PerTensor()), activation=_X_INT8),
    *family("x-int8-uint8-with-zeros", 48, 96, weight("uint8", PerChannel()), activation=_X_INT8),
    *family("x-int8-int4-groups", 64, 128, weight("int4", 32), activation=_X_INT8),
    *family("x-int8-for-all-of-x", 64, 96, _INT8, activation="int8/tensor/dynamic"),
    *family("x-int8-groups", 48, 80, weight("int8", 32), activation="int8/group32/dynamic"),
    # stored scales, which saturate, and zero points
    *family("x-int8-static", 64, 96, _INT8, activation="int8/tensor/static"),
    *family("x-uint8-static", 64, 96, _INT8, activation="uint8/tensor/static"),
    *family("x-uint8-static-bias-odd-n-and-k", 33, 61, _INT8, activation="uint8/tensor/static", bias=True),
    *family("x-float8-static", 64, 96, _FLOAT8_ONE_SCALE, activation="float8_e4m3fn/tensor/static"),
    # 8-bit floating point
    *family("x-float8", 64, 128, _FLOAT8, activation=_X_FLOAT8),
    *family("x-float8-tiles", 128, 256, _FLOAT8, activation=_X_FLOAT8),
    *family("x-float8-bias-odd-n-and-k", 33, 61, _FLOAT8, activation=_X_FLOAT8, bias=True),
    *family("x-float8-one-input", 48, 1, _FLOAT8, activation=_X_FLOAT8),
    *family("x-float8-int4-groups", 64, 128, weight("int4", 32), activation=_X_FLOAT8),
    *family("x-float8_e5m2", 48, 64, _FLOAT8, activation="float8_e5m2/token/dynamic"),
    *family("x-float8-groups-and-blocks", 200, 256, _FLOAT8_BLOCKS, activation="float8_e4m3fn/group128/dynamic"),
    *family("x-float8-ragged-groups-and-blocks", 150, 200, _FLOAT8_BLOCKS, activation="float8_e4m3fn/group128/dynamic"),
    # scales that are powers of two
    *family("x-mxfp8", 64, 128, _MXFP8, activation=_X_MXFP8),
    *family("x-mxfp8-short-last-group", 33, 80, _MXFP8, activation=_X_MXFP8),
    *family("x-mxfp4", 64, 128, _MXFP4, activation=_X_MXFP4),
    *family("x-mxfp8-mxfp4", 32, 96, _MXFP4, activation=_X_MXFP8),
    # scales of scales
    *family("x-nvfp4", 64, 128, _NVFP4, activation=_X_NVFP4),
    *family("x-nvfp4-short-last-group", 33, 40, _NVFP4, activation=_X_NVFP4),
    *family("x-nvfp4-one-input", 48, 1, _NVFP4, activation=_X_NVFP4),
    # fused layers: each segment has stored scales of its own
    *family("x-int8-fused", (64, 32, 32), 96, _INT8, activation=_X_INT8, bias=True),
    *family("x-uint8-static-fused", (64, 32, 32), 96, _INT8, activation="uint8/tensor/static"),
    *family("x-float8-static-fused", (64, 32), 96, _FLOAT8_ONE_SCALE, activation="float8_e4m3fn/tensor/static"),
    *family("x-nvfp4-fused", (64, 32, 32), 96, _NVFP4, activation=_X_NVFP4),
)
"""Every family of quantized x, in every dtype."""
