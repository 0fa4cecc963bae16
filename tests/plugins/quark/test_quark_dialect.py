"""
Quark configurations: every form of a weight and of inputs, rules in their order, the cache, and each error.
"""

from __future__ import annotations

import pytest
from quark_forms import CHANNEL, INT8, MX, PLAIN, TENSOR, TOKEN, layer, section

from quantplug.config import RawConfig
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.spec import ActivationSpec, ElementType
from quantplug_quark.dialect import QuarkDialect

WHERE = "config.json: quantization_config"
LAYER = "model.layers.0.mlp.up_proj"
STATIC = "float8_e4m3fn/tensor/static"
DYNAMIC = "float8_e4m3fn/token/dynamic"
CACHE = ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False)


def parse(fields):
    raw = RawConfig("quark", fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE)
    return QuarkDialect().parse(raw)


def ruling(config, path=LAYER):
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    return None if use is None else (use.name, dict(use.params))


def refused(fields, code, text):
    with pytest.raises(ConfigError) as raised:
        parse(fields)
    assert raised.value.code == code, raised.value
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("weight", "inputs", "scheme", "params"),
    [
        (TENSOR, TENSOR, "fp8", {"element": "float8_e4m3fn", "strategy": "tensor", "activation": STATIC}),
        (TENSOR, None, "fp8", {"element": "float8_e4m3fn", "strategy": "tensor", "activation": "none"}),
        (CHANNEL, TOKEN, "fp8", {"element": "float8_e4m3fn", "strategy": "channel", "activation": DYNAMIC}),
        (
            {**CHANNEL, "dtype": "fp8_e5m2"},
            None,
            "fp8",
            {"element": "float8_e5m2", "strategy": "channel", "activation": "none"},
        ),
        (
            {**PLAIN, "dtype": "fp8_e4m3", "qscheme": "per_group", "group_size": 64},
            None,
            "fp8",
            {"element": "float8_e4m3fn", "strategy": "group", "group_size": 64, "activation": "none"},
        ),
        (
            {**PLAIN, "dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128, 64]},
            {**PLAIN, "dtype": "fp8_e4m3", "qscheme": "per_group", "group_size": 64, "is_dynamic": True},
            "fp8",
            {
                "element": "float8_e4m3fn",
                "strategy": "block",
                "block_n": 128,
                "block_k": 64,
                "activation": "float8_e4m3fn/group64/dynamic",
            },
        ),
        (INT8, None, "int8", {"strategy": "channel", "symmetric": False, "activation": "none"}),
        (
            {**INT8, "qscheme": "per_tensor"},
            {**TENSOR, "dtype": "int8"},
            "int8",
            {"strategy": "tensor", "symmetric": False, "activation": "uint8/tensor/static"},
        ),
        (
            INT8,
            {**TOKEN, "dtype": "int8"},
            "int8",
            {"strategy": "channel", "symmetric": False, "activation": "int8/token/dynamic"},
        ),
        (
            MX,
            {**MX, "is_dynamic": True},
            "mxfp4",
            {
                "weight_name": "weight",
                "scale_name": "weight_scale",
                "activation": "float4_e2m1fn/group32/dynamic/float8_e8m0fnu",
            },
        ),
        (
            {**MX, "dtype": "fp8_e4m3"},
            {**MX, "dtype": "fp8_e4m3", "is_dynamic": True},
            "mxfp8",
            {"scale_name": "weight_scale", "activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"},
        ),
        (
            {**MX, "dtype": "fp8_e4m3", "qscheme": "per_block", "group_size": None, "block_size": [1, 32]},
            None,
            "mxfp8",
            {"scale_name": "weight_scale", "activation": "none"},
        ),
    ],
)
def test_every_form_that_is_read_names_its_scheme(weight, inputs, scheme, params):
    assert ruling(parse(section(weight, inputs))) == (scheme, params)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        ({**PLAIN, "dtype": "uint4", "group_size": 128}, "packed in AWQ's order under names that are not AWQ's"),
        ({**PLAIN, "dtype": "int4", "group_size": 128}, "packed in AWQ's order under names that are not AWQ's"),
        ({**CHANNEL, "dtype": "uint8"}, "uint8: its zero points"),
        ({**PLAIN, "dtype": "int3"}, "three bytes"),
        ({**PLAIN, "dtype": "int2"}, "depending on its version"),
        ({**PLAIN, "dtype": "uint2"}, "depending on its version"),
        ({**MX, "dtype": "fp6_e3m2"}, "six bits"),
        ({**MX, "dtype": "fp6_e2m3"}, "six bits"),
        ({**PLAIN, "dtype": "fp8_e5m3"}, "five bits of exponent"),
        ({**PLAIN, "dtype": "mx", "mx_element_dtype": "fp4"}, "between its codes"),
        ({**PLAIN, "dtype": "mx6"}, "cannot export"),
        ({**PLAIN, "dtype": "mx9"}, "cannot export"),
        ({**PLAIN, "dtype": "bfp16"}, "cannot export"),
        ({**PLAIN, "dtype": "fp5"}, "fp5: not a type that this reader knows"),
        ({**PLAIN, "dtype": "fp4", "group_size": 16}, "fp4 with scales of format null"),
        ({**INT8, "qscheme": "per_group", "group_size": 64}, "stored transposed"),
        ({**CHANNEL, "ch_axis": 1}, "channels along axis the integer 1"),
        ({**MX, "group_size": 16}, "1 rows by 16 inputs"),
        ({**MX, "dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [32, 32]}, "32 rows by 32 inputs"),
        ({**MX, "qscheme": "per_tensor"}, "per_tensor with scales that are powers of two"),
        ({**MX, "dtype": "fp8_e5m2"}, "fp8_e5m2 with scales that are powers of two"),
        ({**TENSOR, "is_dynamic": True}, "stored dense"),
        ({**TENSOR, "is_scale_quant": True}, "the scales are quantized once more"),
        ([{**PLAIN, "dtype": "fp4"}, TENSOR], "quantized in two steps"),
    ],
)
def test_every_other_form_is_refused_by_name_with_the_reason(weight, text):
    refused(section(weight, None), "QP-CFG-REFUSED", text)


@pytest.mark.parametrize(
    ("inputs", "note"),
    [
        ({**MX, "dtype": "fp6_e3m2", "is_dynamic": True}, "inputs of type fp6_e3m2"),
        ({**MX, "group_size": 16, "is_dynamic": True}, "inputs of type fp4"),
        ({**TOKEN, "qscheme": "per_block", "block_size": [1, 32]}, "inputs of type fp8_e4m3"),
    ],
)
def test_a_permission_that_nobody_can_use_is_noted_and_left_out(inputs, note):
    read = parse(section(MX, inputs))
    assert ruling(read)[1]["activation"] == "none"
    assert len(read.notes) == 1
    assert note in read.notes[0]


@pytest.mark.parametrize("inputs", [{**MX, "dtype": "fp6_e2m3"}, {**TOKEN, "is_dynamic": False}, {**MX}])
def test_stored_scales_of_inputs_that_nobody_reads_are_refused(inputs):
    refused(section(MX, inputs), "QP-CFG-REFUSED", "stored scales of inputs of type")


@pytest.mark.parametrize("weight", [None, {}, {**PLAIN, "dtype": "bfloat16"}, {**PLAIN, "dtype": "float16"}])
def test_a_weight_that_is_not_quantized_stays_whole(weight):
    assert ruling(parse(section(weight, None))) is None
    assert ruling(parse(section(layer_quant_config={"*up_proj": layer(weight)}))) is None


def test_names_count_before_patterns_and_patterns_in_their_order_and_exclusions_before_all():
    read = parse(
        section(
            layer_quant_config={
                "*.mlp.*": layer(MX),
                "*up_proj": layer(INT8),
                "model.layers.1.mlp.up_proj": layer(CHANNEL),
            },
            exclude=["lm_head", "re:.*router.*", "*visual*", "model.layers.2."],
        )
    )
    assert ruling(read, "model.layers.0.mlp.up_proj")[0] == "mxfp4"
    assert ruling(read, "model.layers.1.mlp.up_proj")[1]["strategy"] == "channel"
    assert ruling(read, "model.layers.0.other.up_proj")[0] == "int8"
    assert ruling(read, "model.layers.0.self_attn.q_proj")[1]["strategy"] == "tensor"
    for path in ("lm_head", "model.layers.0.router.w", "model.visual.x", "model.layers.2.mlp.up_proj"):
        assert ruling(read, path) is None


def test_the_description_of_linear_classes_counts_before_the_global_one():
    read = parse(section(layer_type_quant_config={"Linear": layer(MX), "Conv2d": layer(None)}))
    assert ruling(read)[0] == "mxfp4"
    refused(
        section(layer_type_quant_config={"Embedding": layer(TENSOR)}), "QP-CFG-REFUSED", "class Embedding are quantized"
    )


def test_quantized_embeddings_are_refused():
    for key in ("model.embed_tokens", "*embed_tokens"):
        refused(section(layer_quant_config={key: layer(MX)}), "QP-CFG-REFUSED", "is an embedding")
    assert parse(section(layer_quant_config={"model.embed_tokens": layer(None)})).rules


KV = {
    "*k_proj": layer(TENSOR, TENSOR, TENSOR),
    "*v_proj": layer(TENSOR, TENSOR, TENSOR),
    "*q_proj": layer(TENSOR, TENSOR, TENSOR),
}


def test_the_cache_is_what_the_outputs_of_the_named_projections_are():
    export = {**section()["export"], "kv_cache_group": ["*k_proj", "*v_proj"]}
    read = parse(section(layer_quant_config=KV, export=export))
    assert read.kv_cache == CACHE
    assert ruling(read, "model.layers.0.self_attn.k_proj")[1]["activation"] == STATIC
    other = {"*k_proj": layer(None, None, TENSOR), "*v_proj": layer(None, None, TENSOR)}
    assert parse(section(kv_cache_quant_config=other)).kv_cache == CACHE
    assert parse(section()).kv_cache is None


@pytest.mark.parametrize(
    ("layers", "group", "code", "text"),
    [
        ({}, ["*k_proj"], "QP-CFG-CONTRADICTION", "nowhere said to be quantized"),
        ({"*o_proj": layer(TENSOR, None, TENSOR)}, [], "QP-CFG-REFUSED", "the output is quantized"),
        ({"*k_proj": layer(TENSOR, None, CHANNEL)}, ["*k_proj"], "QP-CFG-REFUSED", "only FP8 with one stored scale"),
        (
            {"*k_proj": layer(TENSOR, None, {**TENSOR, "is_dynamic": True})},
            ["*k_proj"],
            "QP-CFG-REFUSED",
            "only FP8 with one stored scale",
        ),
        (
            {
                "*k_proj": layer(TENSOR, None, TENSOR),
                "*v_proj": layer(TENSOR, None, {**TENSOR, "dtype": "fp8_e5m2"}),
            },
            ["*k_proj", "*v_proj"],
            "QP-CFG-CONTRADICTION",
            "another cache than",
        ),
        ({}, "*k_proj", "QP-CFG-FIELD", "kv_cache_group is the string"),
    ],
)
def test_a_cache_that_is_not_understood_is_an_error(layers, group, code, text):
    refused(section(layer_quant_config=layers, export={"kv_cache_group": group}), code, text)


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        (section(global_quant_config=...), "QP-CFG-FIELD", "global_quant_config is missing"),
        (section(global_quant_config=3), "QP-CFG-FIELD", "global_quant_config is the integer 3"),
        (section("fp8", None), "QP-CFG-FIELD", "weight: is the string 'fp8'"),
        (section({}, None, layer_quant_config=[]), "QP-CFG-FIELD", "layer_quant_config is a list of 0"),
        (section({**TENSOR, "qscheme": "per_row"}, None), "QP-CFG-FIELD", "qscheme is the string 'per_row'"),
        (section({"qscheme": "per_tensor"}, None), "QP-CFG-FIELD", "dtype is missing"),
        (section({**TENSOR, "dtype": 8}, None), "QP-CFG-FIELD", "dtype is the integer 8"),
        (section({**TENSOR, "is_dynamic": "no"}, None), "QP-CFG-FIELD", "is_dynamic is the string 'no'"),
        (section({**PLAIN, "dtype": "fp8_e4m3", "group_size": 0}, None), "QP-CFG-FIELD", "group_size is the integer 0"),
        (
            section({**TENSOR, "qscheme": "per_block", "block_size": [128]}, None),
            "QP-CFG-FIELD",
            "block_size: is a list of 1",
        ),
        (section({**TENSOR, "outliers": 0.1}, None), "QP-CFG-UNKNOWN", "outliers is the number 0.1"),
        (section(global_quant_config={**layer(TENSOR), "sparsity": "2:4"}), "QP-CFG-UNKNOWN", "sparsity"),
        (section(global_quant_config={**layer(TENSOR), "bias": TENSOR}), "QP-CFG-REFUSED", "the bias is quantized"),
        (section(export={"weight_format": "fake_quantized"}), "QP-CFG-REFUSED", "the weights are stored dense"),
        (section(export=[]), "QP-CFG-FIELD", "export is a list of 0"),
        (section(algo_config=[{"name": "rotation", "r3": True}]), "QP-CFG-REFUSED", "rotates inputs"),
        (section(exclude=["*"]), "QP-SKIP-PATTERN", "would cover every module"),
        (section(exclude="lm_head"), "QP-CFG-FIELD", "expected a list of texts"),
    ],
)
def test_bad_values_are_refused_with_the_place(fields, code, text):
    refused(fields, code, text)


def test_algorithms_that_are_merged_into_the_weights_and_older_files_without_some_keys_are_read():
    read = parse(section(algo_config={"name": "rotation", "r1": True, "r3": False}))
    assert ruling(read)[0] == "fp8"
    old = section(
        export=..., kv_cache_quant_config=..., layer_type_quant_config=..., layer_quant_config=None, exclude=...
    )
    assert ruling(parse(old), "lm_head")[0] == "fp8"
    assert parse(section(global_quant_config=None)).default is None


def test_what_is_left_out_of_account_is_noted():
    read = parse(section(future=1, softmax_quant_spec=TENSOR))
    assert read.notes == (
        f"{WHERE}.future is not known to this reader and left out of account",
        f"{WHERE}.softmax_quant_spec: attention keeps its precision",
    )
