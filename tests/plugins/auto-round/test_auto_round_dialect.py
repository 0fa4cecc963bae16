"""
auto-round configurations: each field's values and errors, the scheme they stand for, and rules in their order.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quantplug.config import RawConfig, resolve_config
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import registry
from quantplug_auto_round.dialect import AutoRoundDialect

GOOD = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 64,
    "sym": True,
    "packing_format": "auto_round:auto_gptq",
}
WHERE = "config.json: quantization_config"
BASE = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}


def parse(**fields: object):
    given = {key: value for key, value in {**GOOD, **fields}.items() if value is not ...}
    raw = RawConfig("auto-round", given, {key: f"{WHERE}.{key}" for key in given}, {}, WHERE)
    return AutoRoundDialect().parse(raw)


def ruling(config, path: str) -> dict[str, object] | None:
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    if use is not None:
        assert use.name == "gptq"
    return None if use is None else dict(use.params)


@pytest.mark.parametrize(
    ("packing", "version"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_gptq", "gptq"),
        (..., "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
    ],
)
def test_the_packing_format_says_how_zero_points_are_stored(packing, version):
    """Nothing else in the file does."""
    assert ruling(parse(packing_format=packing), "model.layers.0.mlp.up_proj") == {**BASE, "checkpoint_format": version}


def test_defaults_are_listed():
    """Symmetric and auto_gptq when nothing is said."""
    fields = {field.name: (field.value, field.origin) for field in parse(sym=..., packing_format=...).fields}
    assert fields["sym"] == (True, "default (sym is absent)")
    assert fields["packing_format"] == ("auto_round:auto_gptq", "default (packing_format is absent)")


FP8 = {"bits": 8, "data_type": "fp", "packing_format": "auto_round:fp8"}
BLOCK_X = {"act_bits": 8, "act_data_type": "fp", "act_dynamic": True, "act_sym": True, "act_group_size": 128}
STATIC_X = {"act_bits": 8, "act_data_type": "fp", "act_dynamic": False, "act_sym": True, "act_group_size": 0}
COMPRESSOR = {"packing_format": "auto_round:llm_compressor"}
MX = {**COMPRESSOR, "data_type": "mx_fp", "group_size": 32}
NV = {**COMPRESSOR, "data_type": "nv_fp", "group_size": 16}
MX_X = {"act_data_type": "mx_fp", "act_dynamic": True, "act_sym": True, "act_group_size": 32}
FORMS = {
    "AWQ's layout": (
        {"packing_format": "auto_round:auto_awq", "sym": False},
        "awq", {"bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    ),
    "AWQ's layout, symmetric": (
        {"packing_format": "auto_awq"}, "awq", {"bits": 4, "group_size": 64, "version": "gemm", "zero_point": False},
    ),
    "blocks of FP8": (
        {**FP8, **BLOCK_X, "group_size": [128, 64], "weight_block_size": [128, 64], "fmt": "e4m3"},
        "fp8", {"element": "float8_e4m3fn", "strategy": "block", "block_n": 128, "block_k": 64,
                "scale_name": "weight_scale_inv", "activation": "float8_e4m3fn/group128/dynamic"},
    ),
    "rows of FP8, static": (
        {**FP8, **STATIC_X, "group_size": -1, "packing_format": "auto_round:fp8_static"},
        "fp8", {"element": "float8_e4m3fn", "strategy": "channel", "activation": "float8_e4m3fn/tensor/static"},
    ),
    "FP8 weights alone": (
        {**FP8, "packing_format": ..., "group_size": 0, "fmt": "e5m2", "act_bits": None},
        "fp8", {"element": "float8_e5m2", "strategy": "tensor", "activation": "none"},
    ),
    "x per token": (
        {**FP8, **BLOCK_X, "act_group_size": -1, "group_size": -1},
        "fp8", {"element": "float8_e4m3fn", "strategy": "channel", "activation": "float8_e4m3fn/token/dynamic"},
    ),
    "MXFP4": (
        {**MX, **MX_X, "bits": 4, "act_bits": 4},
        "mxfp4", {"activation": "float4_e2m1fn/group32/dynamic/float8_e8m0fnu"},
    ),
    "MXFP8": (
        {**MX, **MX_X, "bits": 8, "act_bits": 8},
        "mxfp8", {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"},
    ),
    "MXFP4, weights alone": ({**MX, "bits": 4, "act_bits": 16}, "mxfp4", {"activation": "none"}),
    "NVFP4": (
        {**NV, "bits": 4, "act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16,
         "act_dynamic": True},
        "nvfp4", {"activation": "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_what_numbers_in_what_tensors(name):
    """The scheme by name, which an installed plugin can build; the head is whole in any of them."""
    fields, scheme, params = FORMS[name]
    config = parse(**fields)
    assert (config.default.name, dict(config.default.params)) == (scheme, params)
    assert config.notes == ()
    built = registry().schemes[scheme].item.build(params, "test")
    assert (built.activation_spec() is None) == (params.get("activation", "none") == "none")
    assert Matcher(config.rules, config.default).decide(ModuleInfo("lm_head", "linear")).use is None


def test_layers_may_have_other_numbers():
    """MXFP4 and MXFP8 in one file; what a layer does not say is the file's."""
    config = parse(
        **{**MX, **MX_X}, bits=4, act_bits=4, extra_config={"a.b": {"bits": 8, "act_bits": 8}, "a.c": {"bits": 16}}
    )
    matcher = Matcher(config.rules, config.default)
    uses = {path: matcher.decide(ModuleInfo(path, "linear")).use for path in ("a.b", "a.c", "a.d")}
    assert uses["a.b"].name == "mxfp8"
    assert dict(uses["a.b"].params) == {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}
    assert uses["a.c"] is None
    assert uses["a.d"].name == "mxfp4"


def test_a_file_whose_layers_are_whole_unless_they_say_otherwise():
    """16 bits for the file, fewer for some layers."""
    config = parse(bits=16, block_name_to_quantize="model.layers", extra_config={"a.b": {"bits": 4}})
    assert config.default is None
    assert ruling(config, "a.b") == BASE
    assert ruling(config, "model.layers.0.mlp.up_proj") is None


REFUSED = {
    "AWQ with another width": ({"packing_format": "auto_round:auto_awq", "sym": "no"}, "QP-CFG-FIELD", "sym is the"),
    "compressed-tensors": (COMPRESSOR, "QP-CFG-REFUSED", "compressed-tensors, while data_type is 'int'"),
    "FP8": ({"packing_format": "auto_round:fp8_static"}, "QP-CFG-REFUSED", "FP8 weights and activations"),
    "MXFP": ({"packing_format": "auto_round:mx_fp"}, "QP-CFG-REFUSED", "MXFP"),
    "packing unknown": ({"packing_format": "auto_round:new"}, "QP-CFG-UNKNOWN", "is not a known layout"),
    "packing a number": ({"packing_format": 1}, "QP-CFG-FIELD", "packing_format is the integer 1"),
    "floating-point weights": ({"data_type": "mx_fp"}, "QP-CFG-REFUSED", "means integers, while data_type is 'mx_fp'"),
    "other numbers": ({"data_type": "mx_int"}, "QP-CFG-REFUSED", "data_type is the string 'mx_int'; expected 'int' or"),
    "MXFP packed as it once was": ({**MX, "packing_format": "auto_round:mx_fp"}, "QP-CFG-REFUSED", "'auto_round:mx_fp"),
    "MXFP6": ({**MX, "bits": 6}, "QP-CFG-FIELD", "one of 4, 8"),
    "MX groups of 64": ({**MX, "group_size": 64}, "QP-CFG-FIELD", "one of 32"),
    "NVFP4 groups of 32": ({**NV, "group_size": 32}, "QP-CFG-FIELD", "one of 16"),
    "NVFP4 of 8 bits": ({**NV, "bits": 8}, "QP-CFG-FIELD", "one of 4"),
    "asymmetric FP8": ({**FP8, "group_size": -1, "sym": False}, "QP-CFG-FIELD", "sym is false"),
    "groups of FP8": (FP8, "QP-CFG-FIELD", "group_size is the integer 64; .*blocks"),
    "no group of FP8": ({**FP8, "group_size": ...}, "QP-CFG-FIELD", "group_size is missing"),
    "one side of a block": ({**FP8, "group_size": [128]}, "QP-CFG-FIELD", "group_size is a list of 1"),
    "two block sizes": (
        {**FP8, "group_size": [128, 128], "weight_block_size": [64, 64]}, "QP-CFG-CONTRADICTION",
        r"is \[64, 64\], while .*group_size is \[128, 128\]",
    ),
    "FP8 of 4 bits": ({**FP8, "bits": 4, "group_size": -1}, "QP-CFG-FIELD", "one of 8"),
    "another float": ({**FP8, "group_size": -1, "fmt": "e3m4"}, "QP-CFG-FIELD", "fmt is the string 'e3m4'"),
    "asymmetric x": ({**FP8, **BLOCK_X, "group_size": -1, "act_sym": False}, "QP-CFG-REFUSED", "act_sym is false"),
    "x of another kind": (
        {**FP8, **BLOCK_X, "group_size": -1, "act_data_type": "fp8_gaudi3_sym"}, "QP-CFG-REFUSED", "'fp8_gaudi3_sym'",
    ),
    "MX x, static": ({**MX, **MX_X, "act_bits": 4, "act_dynamic": False}, "QP-CFG-REFUSED", "4 bits, static"),
    "activations": ({"act_bits": 8}, "QP-CFG-REFUSED", "activations are quantized to 8 bits"),
    "double quantization": ({"super_bits": 6}, "QP-CFG-UNKNOWN", "super_bits is the integer 6"),
    "rotation": ({"rotation_config": {"kind": "hadamard"}}, "QP-CFG-UNKNOWN", "rotation_config"),
    "quantized cache": ({"static_kv_dtype": "fp8"}, "QP-CFG-UNKNOWN", "static_kv_dtype"),
    "bits missing": ({"bits": ...}, "QP-CFG-FIELD", "bits is missing"),
    "bits 5": ({"bits": 5}, "QP-CFG-FIELD", "one of 2, 3, 4, 8"),
    "bits a text": ({"bits": "4"}, "QP-CFG-FIELD", "the string '4'"),
    "group a list": ({"group_size": [128, 128]}, "QP-CFG-FIELD", "group_size is a list of 2"),
    "group -2": ({"group_size": -2}, "QP-CFG-FIELD", "at least -1"),
    "sym a text": ({"sym": "true"}, "QP-CFG-FIELD", "sym is the string 'true'"),
    "layers a list": ({"extra_config": []}, "QP-CFG-FIELD", "extra_config is a list of 0"),
    "layer not an object": ({"extra_config": {"a.b": 16}}, "QP-CFG-FIELD", "is the integer 16"),
    "layer bits": ({"extra_config": {"a.b": {"bits": 6}}}, "QP-CFG-FIELD", r"extra_config\['a.b'\].bits: bits is the"),
    "layer data type": (
        {"extra_config": {"a.b": {"bits": 8, "data_type": "fp"}}}, "QP-CFG-REFUSED", r"\['a.b'\].data_type: packing",
    ),
    "layer activations": ({"extra_config": {"a.b": {"act_bits": 4}}}, "QP-CFG-REFUSED", r"\['a.b'\].act_bits"),
    "expression malformed": ({"extra_config": {".*(": {"bits": 16}}}, "QP-SKIP-PATTERN", "extra_config"),
    "expression without bound": ({"extra_config": {"(.*a.*)*b": {"bits": 16}}}, "QP-SKIP-PATTERN", "extra_config"),
    "blocks a number": ({"block_name_to_quantize": 3}, "QP-CFG-FIELD", "block_name_to_quantize"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    """Each with its code and the place; a good configuration parses afterwards."""
    fields, code, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as caught:
        parse(**fields)
    assert caught.value.code == code
    assert caught.value.where.startswith((WHERE, "default"))
    assert parse().default is not None


def test_layers_of_their_own():
    """Names first, then expressions in their order, which are searched for; empty ones say nothing."""
    config = parse(
        extra_config={
            ".*mlp\\.gate.*": {"bits": 16, "act_bits": 16},
            ".*nothing.*": {},
            "mlp\\.(up|gate)_proj": {"group_size": 32},
            "model.layers.0.mlp.gate_proj": {"bits": 8, "sym": False, "data_type": None},
            "lm_head": {"bits": 8, "group_size": 32, "sym": True, "data_type": "int", "act_bits": None},
        }
    )
    assert ruling(config, "model.layers.0.mlp.gate_proj") == {**BASE, "bits": 8, "sym": False}
    assert ruling(config, "model.layers.1.mlp.gate_proj") is None
    assert ruling(config, "model.layers.1.mlp.up_proj") == {**BASE, "group_size": 32}
    assert ruling(config, "model.layers.1.mlp.down_proj") == BASE
    assert ruling(config, "lm_head") == {**BASE, "bits": 8, "group_size": 32}


@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names", "quant_block_list"])
@pytest.mark.parametrize(
    "spelled", ["model.layers,model.more", ["model.layers", "model.more"], [["model.layers"], ["model.more"]]]
)
def test_nothing_outside_the_named_blocks_is_quantized(key, spelled):
    """One text or a list, at dots only."""
    config = parse(**{key: spelled})
    assert ruling(config, "model.layers.0.mlp.up_proj") == BASE
    assert ruling(config, "model.more.0.mlp.up_proj") == BASE
    assert ruling(config, "model.layers_more.0.mlp.up_proj") is None
    assert ruling(config, "vision.blocks.0.mlp.up_proj") is None
    assert ruling(config, "lm_head") is None


def test_without_blocks_everything_but_the_head_is_quantized():
    """auto-round leaves the head whole unless it has parameters of its own."""
    config = parse(modules_to_not_convert=["mlp.gate"])
    assert ruling(config, "model.layers.0.mlp.up_proj") == BASE
    assert ruling(config, "model.layers.0.mlp.gate") is None
    assert ruling(config, "lm_head") is None


def test_unknown_keys_are_noted():
    """Neither an error nor silent."""
    assert parse(iters=20, colour="blue").notes == (
        f"{WHERE}.colour is not known to this reader and left out of account",
    )


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round", "Intel/auto-round"])
def test_the_method_as_writers_spelled_it(method, tmp_path):
    """Early versions wrote their repository's name; a name that a dialect lists is no path."""
    fields = {**GOOD, "quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fields}))
    assert resolve_config(tmp_path, registry()).dialect == "auto-round"


def test_other_methods_with_slashes_stay_refused(tmp_path):
    """Only what an installed dialect lists passes."""
    fields = {**GOOD, "quant_method": "intel/other"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fields}))
    with pytest.raises(ConfigError, match="never a path or code") as caught:
        resolve_config(tmp_path, registry())
    assert caught.value.code == "QP-CFG-METHOD"


def test_the_plugin_imports_without_torch_and_without_its_sibling():
    """The scheme is named, not imported."""
    code = "import sys, quantplug_auto_round.dialect; print({'torch', 'quantplug_gptq'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
