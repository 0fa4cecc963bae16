"""
Families of weights with integer codes.
"""

from __future__ import annotations

from quantplug.spec import PerBlock, PerChannel, PerTensor
from quantplug_testkit.conformance.hazard import Hazard, family, weight

_ONE_GROUP = PerChannel()

INTEGERS: tuple[Hazard, ...] = (
    # every width, with and without zero points
    *(
        hazard
        for bits in (2, 3, 4, 8)
        for kind in ("int", "uint")
        for hazard in family(f"{kind}{bits}-group32", 64, 128, weight(f"{kind}{bits}", 32))
    ),
    # the sizes that tiled kernels like best, so that the pickiest kernel has something to run
    *family("tiles-int4-group128", 256, 256, weight("int4", 128)),
    *family("tiles-uint4-group64", 256, 256, weight("uint4", 64)),
    *family("tiles-uint4-group64-act-order", 128, 256, weight("uint4", 64, act_order=True)),
    *family("tiles-int8-one-group", 128, 256, weight("int8", _ONE_GROUP)),
    # one scale for everything, for a row, for all of K
    *family("one-scale", 48, 96, weight("int8", PerTensor())),
    *family("one-group-int4", 64, 128, weight("int4", _ONE_GROUP)),
    *family("one-group-uint4", 64, 128, weight("uint4", _ONE_GROUP)),
    *family("one-group-int8", 48, 96, weight("int8", _ONE_GROUP)),
    *family("group-is-all-of-k", 64, 128, weight("uint4", 128)),
    *family("group-beyond-k", 64, 96, weight("uint4", 128)),
    # the last group is short
    *family("short-last-group", 64, 80, weight("uint4", 32)),
    *family("short-last-group-int8", 64, 112, weight("int8", 32)),
    *family("short-last-group-act-order", 64, 80, weight("uint4", 32, act_order=True)),
    *family("group-of-48-in-k-100", 32, 100, weight("uint4", 48)),
    *family("one-input-in-the-last-group", 32, 65, weight("int4", 64)),
    # sizes no tile fits
    *family("odd-n", 33, 64, weight("uint4", 32)),
    *family("n-beyond-a-tile", 129, 64, weight("int4", 32)),
    *family("one-output", 1, 64, weight("uint4", 32)),
    *family("odd-k", 32, 37, weight("uint4", 16)),
    *family("prime-n-and-k", 31, 61, weight("uint3", 32)),
    *family("tiny", 3, 5, weight("uint4", 2)),
    *family("one-input", 48, 1, weight("int8", PerChannel())),
    # blocks of rows and inputs, ragged at both edges, larger than the weight, with zero points
    *family("blocks-int8", 64, 96, weight("int8", PerBlock(32, 32), scale_dtype="float32")),
    *family("blocks-ragged-int8", 33, 70, weight("int8", PerBlock(16, 32), scale_dtype="float32")),
    *family("blocks-beyond-n-and-k-int8", 24, 40, weight("int8", PerBlock(128, 128), scale_dtype="bfloat16")),
    *family("blocks-uint4", 40, 80, weight("uint4", PerBlock(16, 32))),
    # many groups, and a sum long enough for a short accumulator to show
    *family("many-groups", 48, 576, weight("uint4", 16)),
    *family("long-sum", 32, 1536, weight("int4", 128)),
    # act-order
    *family("act-order", 64, 128, weight("int4", 32, act_order=True)),
    *family("act-order-uint4", 64, 128, weight("uint4", 32, act_order=True)),
    *family("act-order-int8", 48, 96, weight("int8", 32, act_order=True)),
    # zero points at both ends, where adding one wraps
    *(
        hazard
        for bits in (2, 3, 4, 8)
        for end in ("lowest", "highest")
        for hazard in family(f"zeros-{end}-uint{bits}", 32, 64, weight(f"uint{bits}", 32), zeros=end)
    ),
    *family("zeros-in-the-middle", 64, 128, weight("uint4", 32), zeros="middle"),
    # scales
    *family("scales-some-zero", 64, 128, weight("uint4", 32), scales="some zero"),
    *family("scales-negative", 64, 128, weight("int4", 32), scales="negative"),
    *family("scales-spread", 64, 128, weight("uint4", 32), scales="spread"),
    *family("scales-in-bfloat16", 64, 128, weight("uint4", 32, scale_dtype="bfloat16")),
    *family("scales-in-float32", 64, 128, weight("uint4", 32, scale_dtype="float32")),
    *family("scales-large", 64, 128, weight("int4", 32), scales="large"),
    *family("scales-tiny", 64, 128, weight("int4", 32), scales="tiny"),
    *family("scales-times-a-global-one", 64, 128, weight("int4", 32, global_scale=True)),
    # bias
    *family("bias", 64, 128, weight("uint4", 32), bias=True),
    *family("bias-odd-n", 33, 64, weight("int8", 32), bias=True),
    *family("bias-act-order", 64, 128, weight("int4", 32, act_order=True), bias=True),
    # fused layers: equal shards, unequal shards, one permutation each, different formats
    *family("fused", (64, 32, 32), 128, weight("int4", 32)),
    *family("fused-bias", (64, 32, 32), 128, weight("uint4", 32), bias=True),
    *family("fused-odd", (33, 7, 1), 64, weight("uint4", 32)),
    *family("fused-act-order", (64, 32), 128, weight("uint4", 32, act_order=True)),
    *family(
        "fused-different-formats",
        (48, 32, 16),
        96,
        (weight("int4", 32), weight("uint8", _ONE_GROUP), weight("uint3", 48, act_order=True)),
    ),
)
"""Every family of integers, in every dtype."""
