"""
ModelOpt configurations: every algorithm, both places and both spellings, excludes, mixed files, and each error.

The forms are those that ModelOpt's exporter writes (NVIDIA/Model-Optimizer, `modelopt/torch/export`):
`get_quant_config` and `process_layer_quant_config` in quant_utils.py make hf_quant_config.json,
`convert_hf_quant_config_format` in convert_hf_config.py turns that into `quantization_config`.
"""

from __future__ import annotations

import json

import pytest

from quantplug.config import RawConfig, resolve_config
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import build_registry
from quantplug.spec import ActivationSpec, ElementType
from quantplug_modelopt import plugin
from quantplug_modelopt.dialect import ModelOptDialect

WHERE = "config.json: quantization_config"
NVFP4 = {
    "weight_name": "weight",
    "scale_name": "weight_scale",
    "global_name": "weight_scale_2",
    "input_global_name": "input_scale",
}
MXFP4 = {"weight_name": "weight", "scale_name": "weight_scale"}
W4A4 = {**NVFP4, "activation": "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"}
FP8 = {"strategy": "tensor", "activation": "float8_e4m3fn/tensor/static"}
LAYER = "model.layers.0.mlp.up_proj"

NESTED = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.self_attn.kv_b_proj"],
    },
}
"""The head of a published hf_quant_config.json (github.com/peaceh-nv/TensorRT-LLM, 8d8be36b), its list cut short."""

FLAT = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["model.layers.0.self_attn.kv_b_proj", "lm_head", "model.layers.0.input_layernorm"],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quant_method": "modelopt",
}
"""The same in the words of config.json."""

MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "ignore": ["mtp*", "*.mlp.gate"],
    "quantized_layers": {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "lm_head": {"quant_algo": "MXFP8", "group_size": 32},
    },
}


def parse(fields):
    raw = RawConfig("modelopt", fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE)
    return ModelOptDialect().parse(raw)


def flat(**changes):
    given = {"quant_method": "modelopt", "quant_algo": "FP8", **changes}
    return {key: value for key, value in given.items() if value is not ...}


def ruling(config, path=LAYER):
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    return None if use is None else (use.name, dict(use.params))


def refused(fields, code, text):
    with pytest.raises(ConfigError) as raised:
        parse(fields)
    assert raised.value.code == code, raised.value
    assert text in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("algo", "scheme", "params"),
    [
        ("FP8", "fp8", FP8),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8", {"strategy": "channel", "activation": "float8_e4m3fn/token/dynamic"}),
        ("FP8_PB_WO", "fp8", {"strategy": "block", "block_n": 128, "block_k": 128, "activation": "none"}),
        ("fp8_pb_wo", "fp8", {"strategy": "block", "block_n": 128, "block_k": 128, "activation": "none"}),
        ("NVFP4", "nvfp4", W4A4),
        ("W4A16_NVFP4", "nvfp4", {**NVFP4, "activation": "none"}),
        ("W4A8_NVFP4_FP8", "nvfp4", {**NVFP4, "activation": "float8_e4m3fn/tensor/static"}),
        ("W4A8_MXFP4_FP8", "mxfp4", {**MXFP4, "activation": "float8_e4m3fn/tensor/dynamic"}),
        ("mxfp4", "mxfp4", {**MXFP4, "activation": "none"}),
        (
            "MXFP8",
            "mxfp8",
            {"scale_name": "weight_scale", "activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"},
        ),
        ("W8A16", "int8", {"strategy": "channel", "activation": "none"}),
        ("W8A8_SQ_PER_CHANNEL", "int8", {"strategy": "channel", "activation": "int8/tensor/static"}),
    ],
)
def test_every_algorithm_that_is_read_names_its_scheme(algo, scheme, params):
    assert ruling(parse(flat(quant_algo=algo))) == (scheme, params)
    assert ruling(parse({"quantization": {"quant_algo": algo}})) == (scheme, params)


@pytest.mark.parametrize(
    ("algo", "reason"),
    [
        ("W4A16_AWQ", "two rows of the weight share a byte"),
        ("INT4_AWQ", "two rows of the weight share a byte"),
        ("W4A8_AWQ", "rounded to FP8 in between"),
        ("NVFP4_AWQ", "pre_quant_scale"),
        ("NVFP4_SVD", "a low-rank product of the inputs is added"),
        ("INT8_SQ", "pre_quant_scale"),
        ("fp8_pb_real", "not stated anywhere"),
        ("FP8_BLOCK_SCALES", "weight_scale_inv"),
    ],
)
def test_every_other_known_algorithm_is_refused_by_name_with_the_reason(algo, reason):
    error = refused(flat(quant_algo=algo), "QP-CFG-REFUSED", reason)
    assert algo.upper() in error.what
    assert error.where == f"{WHERE}.quant_algo"


def test_an_unknown_or_missing_algorithm_is_an_error():
    refused(flat(quant_algo="FP2"), "QP-CFG-UNKNOWN", "'FP2' is not a known algorithm")
    refused(flat(quant_algo=...), "QP-CFG-FIELD", "quant_algo is null")
    refused(flat(quant_algo=8), "QP-CFG-FIELD", "quant_algo is the integer 8")


@pytest.mark.parametrize("config", [{"quant_method": "modelopt", **NESTED}, FLAT, {**FLAT, **NESTED}, NESTED])
def test_both_places_and_both_spellings_say_the_same(config):
    read = parse(config)
    assert ruling(read) == ("nvfp4", W4A4)
    assert ruling(read, "lm_head") is None
    assert ruling(read, "model.layers.0.self_attn.kv_b_proj") is None
    assert ruling(read, "model.layers.10.self_attn.kv_b_proj") == ("nvfp4", W4A4)
    assert (read.kv_cache, read.notes) == (None, ())


@pytest.mark.parametrize(
    ("nested", "text"),
    [
        ({"quant_algo": "FP8"}, "is the string 'FP8', while config.json: quantization_config.quant_algo is"),
        (
            {"exclude_modules": ["lm_head"]},
            "ignore is a list of 3 (in one of them only: model.layers.0.input_layernorm, model.layers.0.self_attn.",
        ),
        ({"group_size": 32, "quant_algo": "NVFP4"}, "group_size is 32; expected 16"),
        ({"kv_cache_quant_algo": "FP8", "kv_cache_scheme": "NVFP4"}, "is the string 'NVFP4', while"),
    ],
)
def test_places_that_disagree_are_an_error_with_both_values(nested, text):
    with pytest.raises(ConfigError) as raised:
        parse({**FLAT, "quantization": {**NESTED["quantization"], **nested}})
    assert raised.value.code in ("QP-CFG-CONTRADICTION", "QP-CFG-FIELD")
    assert text in str(raised.value)


def test_a_place_that_says_nothing_contradicts_nothing():
    read = parse({**FLAT, "quantization": {"quant_algo": None, "exclude_modules": None}})
    assert ruling(read, "lm_head") is None


@pytest.mark.parametrize(
    ("pattern", "skipped", "kept"),
    [
        ("lm_head", "lm_head", LAYER),
        ("*lm_head", "language_model.lm_head", LAYER),
        ("model.layers.3.*", "model.layers.3.mlp.up_proj", "model.layers.30.mlp.up_proj"),
        ("model.layers.3", "model.layers.3.mlp.up_proj", "model.layers.30.mlp.up_proj"),
        ("model.layers.3*", "model.layers.30.mlp.up_proj", "model.layers.4.mlp.up_proj"),
        ("mtp*", "mtp_layers.0.mlp.down_proj", LAYER),
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", LAYER),
        ("*router*", "model.layers.0.mlp.router", LAYER),
    ],
)
def test_excludes_are_globs_over_whole_paths_and_plain_paths_cover_what_lies_below(pattern, skipped, kept):
    read = parse(flat(ignore=[pattern]))
    assert ruling(read, skipped) is None
    assert ruling(read, kept) == ("fp8", FP8)


def test_a_mixed_file_quantizes_what_it_lists_and_nothing_else():
    read = parse(MIXED)
    assert read.default is None
    assert ruling(read, "model.layers.0.self_attn.q_proj") == ("fp8", FP8)
    assert ruling(read, "model.layers.0.self_attn.k_proj") is None
    assert ruling(read, "model.layers.0.mlp.up_proj") == ("nvfp4", W4A4)
    assert ruling(read, "model.layers.0.mlp.down_proj") == ("nvfp4", {**NVFP4, "activation": "none"}), "the longer path"
    assert ruling(read, "model.layers.0.mlp.gate") is None, "what is excluded counts first"
    assert ruling(read, "model.layers.00.mlp.up_proj") is None
    assert ruling(read, "lm_head")[0] == "mxfp8"


@pytest.mark.parametrize(
    ("layers", "code", "text"),
    [
        (..., "QP-CFG-FIELD", "no quantized_layers says which"),
        ({}, "QP-CFG-FIELD", "no quantized_layers says which"),
        ([], "QP-CFG-FIELD", "quantized_layers is a list of 0"),
        ({"a.b": "FP8"}, "QP-CFG-FIELD", "a.b is the string 'FP8'; expected an object"),
        ({"a.b": {}}, "QP-CFG-FIELD", "quant_algo is null"),
        ({"a.b": {"quant_algo": "FP1"}}, "QP-CFG-UNKNOWN", "quantized_layers['a.b'].quant_algo"),
        ({"a.b": {"quant_algo": "MIXED_PRECISION"}}, "QP-CFG-UNKNOWN", "is not a known algorithm"),
        ({"a.b": {"quant_algo": "NVFP4", "group_size": 32}}, "QP-CFG-FIELD", "group_size is 32; expected 16"),
        ({"a.b": {"quant_algo": "NVFP4", "group_size": "16"}}, "QP-CFG-FIELD", "the string '16'"),
        (
            {"a.b": {"quant_algo": "NVFP4", "weight_scale_encoding": "csf"}},
            "QP-CFG-UNKNOWN",
            "weight_scale_encoding is the string 'csf', which may change",
        ),
        ({"a.b": {"quant_algo": "FP8", "pre_quant_scale": True}}, "QP-CFG-REFUSED", "pre_quant_scale is true"),
        ({"a.b": {"quant_algo": "NVFP4_AWQ", "pre_quant_scale": True}}, "QP-CFG-REFUSED", "quant_algo 'NVFP4_AWQ'"),
        ({"model.embed_tokens": {"quant_algo": "NVFP4"}}, "QP-CFG-REFUSED", "is an embedding"),
        ({"": {"quant_algo": "FP8"}}, "QP-SKIP-PATTERN", "an empty text"),
    ],
)
def test_a_mixed_file_with_a_bad_list_is_refused(layers, code, text):
    fields = {**MIXED, "quantized_layers": layers}
    if layers is ...:
        del fields["quantized_layers"]
    refused(fields, code, text)


def test_a_layer_may_say_that_its_group_size_is_none():
    read = parse({**MIXED, "quantized_layers": {"a": {"quant_algo": "FP8", "group_size": 0}}})
    assert ruling(read, "a") == ("fp8", FP8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"weights": {"num_bits": 8, "type": "float"}},
            "weights.num_bits: means the integer 8, while quant_algo means the",
        ),
        ({"weights": {"num_bits": 4, "type": "int"}}, "weights.type: means the string 'int'"),
        ({"weights": {"num_bits": 4, "type": "float", "group_size": 32}}, "weights.group_size: means the integer 32"),
        ({"input_activations": None}, "input_activations: means weights only, while quant_algo means quantized activ"),
    ],
)
def test_groups_that_contradict_the_algorithm_are_an_error(change, text):
    group = {**FLAT["config_groups"]["group_0"], **change}
    refused({**FLAT, "config_groups": {"group_0": group}}, "QP-CFG-CONTRADICTION", text)


def test_quantized_embeddings_are_refused():
    group = {**FLAT["config_groups"]["group_0"], "targets": ["Embedding", "Linear"]}
    refused({**FLAT, "config_groups": {"group_0": group}}, "QP-CFG-REFUSED", "is an embedding")


@pytest.mark.parametrize(
    ("stated", "spec"),
    [
        ({"kv_cache_quant_algo": "FP8"}, ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False)),
        ({"kv_cache_quant_algo": "fp8"}, ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False)),
        (
            {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
            ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False),
        ),
        ({"kv_cache_scheme": "INT8"}, ActivationSpec(ElementType.INT8, "tensor", dynamic=False)),
        (
            {"kv_cache_scheme": "NVFP4"},
            ActivationSpec(
                ElementType.FLOAT4_E2M1FN,
                "group",
                dynamic=True,
                group_size=16,
                scale_dtype="float8_e4m3fn",
                global_scale=True,
            ),
        ),
        ({"kv_cache_quant_algo": None}, None),
        ({}, None),
    ],
)
def test_the_cache_of_keys_and_values_is_handed_over(stated, spec):
    assert parse(flat(**stated)).kv_cache == spec
    assert parse({"quantization": {"quant_algo": "FP8", **stated}}).kv_cache == spec


@pytest.mark.parametrize(
    ("stated", "code", "text"),
    [
        ({"kv_cache_quant_algo": "NVFP4_AFFINE"}, "QP-CFG-UNKNOWN", "NVFP4_AFFINE"),
        ({"kv_cache_quant_algo": 8}, "QP-CFG-FIELD", "the integer 8"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "QP-CFG-UNKNOWN", "num_bits the integer 4"),
        ({"kv_cache_scheme": {}}, "QP-CFG-UNKNOWN", "type null"),
        (
            {"kv_cache_scheme": {"num_bits": 8, "type": "int"}, "kv_cache_quant_algo": "FP8"},
            "QP-CFG-CONTRADICTION",
            "while config.json: quantization_config.kv_cache_quant_algo is the string 'FP8'",
        ),
    ],
)
def test_a_cache_that_is_not_understood_is_an_error(stated, code, text):
    refused(flat(**stated), code, text)


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        (flat(ignore="lm_head"), "QP-CFG-FIELD", "ignore is the string 'lm_head'"),
        (flat(ignore=[3]), "QP-CFG-FIELD", "ignore[0] is the integer 3"),
        (flat(ignore=["*"]), "QP-SKIP-PATTERN", "would cover every module"),
        (flat(ignore=[""]), "QP-SKIP-PATTERN", "would cover every module"),
        (flat(quantization=[]), "QP-CFG-FIELD", "quantization is a list of 0"),
        (flat(config_groups=[]), "QP-CFG-FIELD", "config_groups is a list of 0"),
        (flat(config_groups={"group_0": 3}), "QP-CFG-FIELD", "group_0 is the integer 3"),
        (flat(group_size="16", quant_algo="NVFP4"), "QP-CFG-FIELD", "group_size is the string '16'"),
        (flat(group_size=-1, quant_algo="NVFP4"), "QP-CFG-FIELD", "group_size is the integer -1"),
        (flat(quant_algo="MXFP8", group_size=16), "QP-CFG-FIELD", "group_size is 16; expected 32"),
        (flat(pre_quant_scale=True), "QP-CFG-REFUSED", "pre_quant_scale is true"),
        (flat(has_zero_point=True), "QP-CFG-REFUSED", "has_zero_point is true"),
    ],
)
def test_bad_values_are_refused_with_the_place(fields, code, text):
    refused(fields, code, text)


def test_unknown_keys_are_noted_with_their_places():
    read = parse({**flat(future=1), "quantization": {"quant_algo": "FP8", "coming": 2}})
    assert read.notes == (
        f"{WHERE}.future is not known to this reader and left out of account",
        f"{WHERE}.quantization.coming is not known to this reader and left out of account",
    )


@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4", "ModelOpt"])
def test_the_file_beside_is_found_merged_and_checked(tmp_path, method):
    registry = build_registry({"modelopt": plugin})
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(NESTED))
    (tmp_path / "config.json").write_text("{}")
    alone = resolve_config(tmp_path, registry)
    assert (alone.dialect, ruling(alone)) == ("modelopt", ("nvfp4", W4A4))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**FLAT, "quant_method": method}}))
    both = resolve_config(tmp_path, registry)
    assert ruling(both) == ruling(alone)
    other = {**FLAT, "quant_algo": "FP8", "config_groups": {}, "quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": other}))
    with pytest.raises(ConfigError) as raised:
        resolve_config(tmp_path, registry)
    assert raised.value.code == "QP-CFG-CONTRADICTION"
    assert raised.value.where == "hf_quant_config.json: quantization.quant_algo"
