"""
Configurations that contradict themselves, or say what is not read: each with its code, its place, and what to do.
"""

from __future__ import annotations

import pytest
from ct_files import FLOAT8, MX4, NV, TOKEN8, WHERE, group, one, parse, section

from quantplug.errors import ConfigError

REFUSED = {
    "no groups": (section(), "QP-CFG-FIELD", "names no group"),
    "groups a list": (section() | {"config_groups": []}, "QP-CFG-FIELD", "config_groups is a list"),
    "a group a number": (
        section() | {"config_groups": {"g": 4}},
        "QP-CFG-FIELD",
        r"config_groups\.g: is the integer 4",
    ),
    "a preset": (
        section() | {"config_groups": {"W4A16": ["Linear"]}},
        "QP-CFG-REFUSED",
        "preset.*Write the arguments out",
    ),
    "no targets": (section({"weights": {}}), "QP-CFG-FIELD", r"group_0: targets is missing"),
    "targets a text": (section({"targets": "Linear", "weights": {}}), "QP-CFG-FIELD", r"group_0\.targets"),
    "an empty target": (section(group([""])), "QP-SKIP-PATTERN", "would cover every module"),
    "a key unheard of": (section({"targets": ["Linear"], "bits": 4}), "QP-CFG-UNKNOWN", r"group_0\.bits"),
    "an argument unheard of": (one(is_mx=True), "QP-CFG-UNKNOWN", r"weights\.is_mx.*may change what tensors mean"),
    "quantized outputs": (
        section({"targets": ["Linear"], "weights": {}, "output_activations": TOKEN8}),
        "QP-CFG-REFUSED",
        r"output_activations.*kv_cache_scheme",
    ),
    "weights a list": (section({"targets": ["Linear"], "weights": [4]}), "QP-CFG-FIELD", "weights is a list of 1"),
    "ignore a text": (one(group_size=32) | {"ignore": "lm_head"}, "QP-CFG-FIELD", "ignore"),
    "bits a text": (one(num_bits="4"), "QP-CFG-FIELD", "the string '4'"),
    "bits 0": (one(num_bits=0), "QP-CFG-FIELD", "at least 1"),
    "a type unheard of": (one(type="uint"), "QP-CFG-FIELD", "'uint'"),
    "symmetric a text": (one(symmetric="false"), "QP-CFG-FIELD", "symmetric is the string 'false'"),
    "a strategy unheard of": (one(strategy="row"), "QP-CFG-FIELD", "'row'"),
    "a size of -2": (one(group_size=-2), "QP-CFG-FIELD", "at least -1"),
    "a size of 0": (one(group_size=0, strategy="group"), "QP-CFG-CONTRADICTION", "is 0 with strategy 'group'"),
    "groups without a size": (one(strategy="group"), "QP-CFG-CONTRADICTION", "is absent with strategy 'group'"),
    "rows with a size": (
        one(strategy="channel", group_size=32),
        "QP-CFG-CONTRADICTION",
        "is 32 with strategy 'channel'",
    ),
    "blocks without sizes": (one(strategy="block"), "QP-CFG-CONTRADICTION", "is absent with strategy 'block'"),
    "sizes without blocks": (one(block_structure=[8, 8]), "QP-CFG-CONTRADICTION", "is 8 x 8 with strategy 'tensor'"),
    "one size of a block": (one(strategy="block", block_structure=[128]), "QP-CFG-FIELD", "two sizes"),
    "a block of true": (one(strategy="block", block_structure=[True, 128]), "QP-CFG-FIELD", "two sizes"),
    "a block of 0": (one(strategy="block", block_structure="0x128"), "QP-CFG-FIELD", "two sizes"),
    "a block of words": (one(strategy="block", block_structure="axb"), "QP-CFG-FIELD", "the string 'axb'"),
    "an order unheard of": (one(group_size=32, actorder="desc"), "QP-CFG-FIELD", "the string 'desc'"),
    "an order of rows": (one(strategy="channel", actorder="group"), "QP-CFG-CONTRADICTION", "orders groups.*'channel'"),
    "dynamic a number": (one(dynamic=1), "QP-CFG-FIELD", "dynamic is the integer 1"),
    "dynamic weights": (one(group_size=32, dynamic=True), "QP-CFG-CONTRADICTION", r"weights\.dynamic: is true"),
    "weights per token": (one(strategy="token", dynamic=True), "QP-CFG-CONTRADICTION", "is true"),
    "local scales of rows": (
        one({"dynamic": "local", "strategy": "token"}),
        "QP-CFG-CONTRADICTION",
        "'local' with strategy 'token'",
    ),
    "static tokens": (one({"strategy": "token"}), "QP-CFG-CONTRADICTION", "is false with strategy 'token'"),
    "static groups of x": (one({"group_size": 32}), "QP-CFG-REFUSED", "stored scales are one per tensor"),
    "x per channel": (one({"strategy": "channel", "group_size": -1}), "QP-CFG-REFUSED", "activations per 'channel'"),
    "x in six bits": (one({"num_bits": 6}), "QP-CFG-REFUSED", "type int with 6 bits"),
    "x in half floats": (one({"num_bits": 16, "type": "float"}), "QP-CFG-REFUSED", "type float with 16 bits"),
    "floats with zero points": (one({"type": "float", "symmetric": False}), "QP-CFG-CONTRADICTION", "floating-point"),
    "scales of x in odd floats": (one({**TOKEN8, "scale_dtype": "torch.float8_e5m2"}), "QP-CFG-REFUSED", "float8_e5m2"),
    "x per tensor under groups": (one({**NV, "dynamic": True}, **NV), "QP-CFG-REFUSED", "'local', as NVFP4"),
    "weights with odd zero points": (one(**FLOAT8, symmetric=False), "QP-CFG-CONTRADICTION", "floating-point"),
    "five bits": (one(num_bits=5, group_size=32), "QP-CFG-REFUSED", "codes of 5 bits are not read in this format"),
    "sixteen bits": (one(num_bits=16, group_size=32), "QP-CFG-REFUSED", "codes of 16 bits"),
    "three bits one by one": (one(TOKEN8, num_bits=3, group_size=32), "QP-CFG-REFUSED", "codes of 3 bits"),
    "a format of many": (one(form="mixed-precision"), "QP-CFG-FIELD", "no format of one group"),
    "a format a number": (one(form=4), "QP-CFG-FIELD", "format is the integer 4"),
    "a format unheard of": (one(form="zip-quantized"), "QP-CFG-UNKNOWN", "'zip-quantized' is not known"),
    "the file's format unheard of": (one() | {"format": "zip"}, "QP-CFG-UNKNOWN", r"\.format: format 'zip'"),
    **{
        f"format {form}": (one() | {"format": form}, "QP-CFG-REFUSED", f"'{form}' is not read: .*convert the dense")
        for form in ("dense", "fakequant", "mxfp6-pack-quantized", "marlin-24", "sparse-24-bitmask", "sparse-bitmask")
    },
    "packed floats": (
        one(form="pack-quantized", **FLOAT8),
        "QP-CFG-CONTRADICTION",
        "type 'float', and the format is 'pack",
    ),
    "packed blocks": (
        one(form="pack-quantized", strategy="block", block_structure=[8, 8]),
        "QP-CFG-CONTRADICTION",
        "strategy 'block'",
    ),
    "integers as floats": (one(form="float-quantized", num_bits=8), "QP-CFG-CONTRADICTION", "expected type 'float'"),
    "floats as integers": (one(form="int-quantized", **FLOAT8), "QP-CFG-CONTRADICTION", "expected type 'int'"),
    "four-bit floats alone": (
        one(form="naive-quantized", num_bits=4, type="float"),
        "QP-CFG-CONTRADICTION",
        "4 bits.*8 bits",
    ),
    "integers under a global scale": (
        one(form="int-quantized", num_bits=8, strategy="tensor_group", group_size=16),
        "QP-CFG-CONTRADICTION",
        "tensor_group",
    ),
    "MXFP4 in wrong groups": (
        one(form="mxfp4-pack-quantized", **{**MX4, "group_size": 16}),
        "QP-CFG-CONTRADICTION",
        "group_size 32",
    ),
    "MXFP8 with wrong scales": (
        one(form="mxfp8-quantized", **{**MX4, "num_bits": 8, "scale_dtype": "torch.float16"}),
        "QP-CFG-CONTRADICTION",
        "scales in float16",
    ),
    "NVFP4 in plain groups": (
        one(form="nvfp4-pack-quantized", **{**NV, "strategy": "group"}),
        "QP-CFG-CONTRADICTION",
        "tensor_group",
    ),
    "NVFP4 with wrong scales": (
        one(form="nvfp4-pack-quantized", **{**NV, "scale_dtype": "torch.uint8"}),
        "QP-CFG-CONTRADICTION",
        "scales in uint8",
    ),
    "sparse weights": (
        one(group_size=32) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "QP-CFG-REFUSED",
        "sparsity_config: .*'sparse-24-bitmask'.*zeros would be left out",
    ),
    "rotations": (
        one(group_size=32) | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        "QP-CFG-REFUSED",
        "transform_config: .*rotations",
    ),
    "pruned experts": (one(group_size=32) | {"moe_sparsity_config": {"method": "prune"}}, "QP-CFG-REFUSED", "experts"),
    "a status unheard of": (one(group_size=32) | {"quantization_status": "done"}, "QP-CFG-FIELD", "'done'"),
    "a cache per head": (
        one(group_size=32) | {"kv_cache_scheme": {"strategy": "attn_head"}},
        "QP-CFG-REFUSED",
        "'attn_head'",
    ),
    "a cache a number": (
        one(group_size=32) | {"kv_cache_scheme": 8},
        "QP-CFG-FIELD",
        "kv_cache_scheme is the integer 8",
    ),
    "an expression without bound": (section(group(["re:(.*a.*)*b"])), "QP-SKIP-PATTERN", r"targets\[0\]"),
    "an ignored one without bound": (
        one(group_size=32) | {"ignore": ["x", "re:([a-z_0-9]+\\.?)+X$"]},
        "QP-SKIP-PATTERN",
        r"ignore\[1\]",
    ),
    "an expression malformed": (section(group(["re:("])), "QP-SKIP-PATTERN", "malformed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    fields, code, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as caught:
        parse(fields)
    assert caught.value.code == code
    assert caught.value.where.startswith((WHERE, "default"))
