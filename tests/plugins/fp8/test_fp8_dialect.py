"""
Configurations: each field's values and errors, lists of layers, the cache of keys and values, both methods.
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
from quantplug_fp8 import plugin
from quantplug_fp8.dialect import FP8Dialect
from quantplug_fp8.fbgemm import FbgemmDialect
from quantplug_fp8.scheme import FP8Scheme

WHERE = "config.json: quantization_config"
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQMODEL = {
    "bits": 8, "checkpoint_format": "float8_e4m3fn", "desc_act": False, "format": "float8_e4m3fn", "group_size": -1,
    "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "method": "fp8", "pack_dtype": "int32",
    "weight_scale_method": "row", "weight_scale_semantics": "inverse",
}  # fmt: skip
GPTQMODEL_BLOCKS = {**GPTQMODEL, "weight_scale_method": "block", "weight_block_size": [128, 128]}
PATH = "model.layers.0.mlp.up_proj"


def parse(dialect=None, **fields: object):
    dialect = dialect or FP8Dialect()
    fields = {"quant_method": dialect.methods[0], **fields}
    return dialect.parse(RawConfig(dialect.methods[0], fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE))


def ruling(config, path: str) -> FP8Scheme | None:
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    return None if use is None else FP8Scheme.build(dict(use.params), path)


BY_TOKEN = "per token, dynamic"
PER_TENSOR = f"fp8 e4m3fn per tensor, x float8_e4m3fn {BY_TOKEN}"
ACCEPTED = {
    "nothing": ({}, PER_TENSOR),
    "null blocks": ({"weight_block_size": None}, PER_TENSOR),
    "static": ({"activation_scheme": "static"}, "fp8 e4m3fn per tensor, x float8_e4m3fn per tensor, static"),
    "STATIC": ({"activation_scheme": "STATIC"}, "fp8 e4m3fn per tensor, x float8_e4m3fn per tensor, static"),
    "DeepSeek's": (DEEPSEEK, "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic"),
    "static blocks": (
        {**DEEPSEEK, "activation_scheme": "static"}, "fp8 e4m3fn block 128x128, x float8_e4m3fn per tensor, static",
    ),
    "narrow blocks": (
        {"weight_block_size": [1, 64]}, "fp8 e4m3fn block 1x64, x float8_e4m3fn group 64, dynamic",
    ),
    "e5m2": ({"fmt": "e5m2"}, f"fp8 e5m2 per tensor, x float8_e5m2 {BY_TOKEN}"),
    "e4m3fnuz": ({"fmt": "e4m3fnuz"}, f"fp8 e4m3fnuz per tensor, x float8_e4m3fnuz {BY_TOKEN}"),
    "auto-round per row": ({"group_size": -1, "bits": 8}, f"fp8 e4m3fn per channel, x float8_e4m3fn {BY_TOKEN}"),
    "auto-round per tensor": ({"group_size": 0, "data_type": "fp"}, PER_TENSOR),
    "auto-round blocks": (
        {**DEEPSEEK, "group_size": [128, 128], "act_dynamic": True, "act_bits": 8, "sym": True},
        "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic",
    ),
    "empty lists": ({"ignored_layers": [], "modules_to_not_convert": None}, PER_TENSOR),
    "harmless keys": (
        {"modules_to_convert": None, "expert_dtype": "fp8", "config_groups": {}},
        PER_TENSOR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_fields_mean(name):
    """The scheme of every linear layer, which takes scales in either spelling."""
    fields, words = ACCEPTED[name]
    scheme = ruling(parse(**fields), PATH)
    assert scheme.describe() == words
    assert scheme.scale_name == "either"


DIVIDED = {
    "rows": (GPTQMODEL, f"fp8 e4m3fn per channel, scales divide, x float8_e4m3fn {BY_TOKEN}"),
    "ROW": (
        {**GPTQMODEL, "weight_scale_method": "ROW", "weight_scale_semantics": "Inverse"},
        f"fp8 e4m3fn per channel, scales divide, x float8_e4m3fn {BY_TOKEN}",
    ),
    "blocks": (GPTQMODEL_BLOCKS, "fp8 e4m3fn block 128x128, scales divide"),
    "one for all": (
        {**GPTQMODEL, "weight_scale_method": "tensor"},
        f"fp8 e4m3fn per tensor, scales divide, x float8_e4m3fn {BY_TOKEN}",
    ),
    "method alone": (
        {"weight_scale_method": "row"}, f"fp8 e4m3fn per channel, scales divide, x float8_e4m3fn {BY_TOKEN}",
    ),
    "semantics alone": (
        {"weight_scale_semantics": "inverse", "weight_block_size": [64, 32]}, "fp8 e4m3fn block 64x32, scales divide",
    ),
    "e5m2": (
        {**GPTQMODEL_BLOCKS, "format": "e5m2", "checkpoint_format": "float8_e5m2"},
        "fp8 e5m2 block 128x128, scales divide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
def test_scales_that_divide(name):
    """GPTQModel's spelling: said by name, or by the words that it alone has; its keys are all known."""
    fields, words = DIVIDED[name]
    config = parse(**fields)
    scheme = ruling(config, PATH)
    assert scheme.describe() == words
    assert scheme.required_suffixes == {"weight", "weight_scale_inv"}
    assert config.notes == ()


def test_layers_that_gptqmodel_left_alone():
    """`dynamic` with a minus names them by expression; parameters of single layers are refused, not passed over."""
    config = parse(**GPTQMODEL, dynamic={r"-:.*\.mlp\.": {}})
    assert ruling(config, PATH) is None
    assert ruling(config, "model.layers.0.self_attn.q_proj") is not None
    config = parse(**GPTQMODEL, dynamic={r"+:.*\.mlp\.": {"weight_scale_method": "tensor"}})
    with pytest.raises(ConfigError, match="weight_scale_method: is no parameter of fp8") as caught:
        ruling(config, PATH)
    assert caught.value.code == "QP-CFG-UNKNOWN"


def test_powers_of_two_for_the_scales_of_x_too():
    """`scale_fmt` of DeepSeek-V3.1 and later."""
    activation = ruling(parse(**DEEPSEEK, scale_fmt="ue8m0"), PATH).activation
    assert (activation.scale_dtype, activation.group_size) == ("float8_e8m0fnu", 128)
    assert ruling(parse(scale_fmt="ue8m0"), PATH).activation.scale_dtype == "float32"


def test_blocks_of_mxfp8_are_named_as_what_they_are():
    """A row of 32 with a power of two: the bytes are another scheme's, and so is their reading."""
    use = parse(weight_block_size=[1, 32], scale_fmt="ue8m0").default
    assert (use.name, dict(use.params)) == (
        "mxfp8",
        {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu", "scale_name": "weight_scale_inv"},
    )
    assert parse(weight_block_size=[1, 32]).default.name == "fp8"


def test_defaults_are_listed_as_such():
    """Every key with where it came from; a default that readers disagree about is noted."""
    config = parse(fmt="e5m2")
    fields = {field.name: (field.value, field.origin) for field in config.fields}
    assert fields["fmt"] == ("e5m2", f"{WHERE}.fmt")
    assert fields["activation_scheme"] == ("dynamic", "default (activation_scheme is absent)")
    assert fields["weight_block_size"] == (None, "default (weight_block_size is absent)")
    assert any("Transformers would take blocks" in note for note in config.notes)
    assert not parse(weight_block_size=None).notes


REFUSED = {
    "scheme unknown": ({"activation_scheme": "token"}, "QP-CFG-FIELD", "the string 'token'; expected one of 'dynamic'"),
    "scheme null": ({"activation_scheme": None}, "QP-CFG-FIELD", "activation_scheme is null"),
    "scheme true": ({"activation_scheme": True}, "QP-CFG-FIELD", "activation_scheme is true"),
    "fmt unknown": ({"fmt": "e3m4"}, "QP-CFG-FIELD", "the string 'e3m4'"),
    "scale_fmt unknown": ({"scale_fmt": "ue4m3"}, "QP-CFG-FIELD", "the string 'ue4m3'"),
    "blocks a number": ({"weight_block_size": 128}, "QP-CFG-FIELD", "weight_block_size is the integer 128"),
    "blocks a text": ({"weight_block_size": "128"}, "QP-CFG-FIELD", "the string '128'"),
    "blocks of one": ({"weight_block_size": [128]}, "QP-CFG-FIELD", "a list of 1 .the integer 128."),
    "blocks of three": ({"weight_block_size": [1, 2, 3]}, "QP-CFG-FIELD", "a list of 3"),
    "blocks empty": ({"weight_block_size": []}, "QP-CFG-FIELD", "a list of 0; expected two integers"),
    "blocks of 0": ({"weight_block_size": [128, 0]}, "QP-CFG-FIELD", "the integer 0"),
    "blocks of true": ({"weight_block_size": [True, 128]}, "QP-CFG-FIELD", "true, the integer 128"),
    "blocks of 128.0": ({"weight_block_size": [128.0, 128]}, "QP-CFG-FIELD", "the number 128.0"),
    "blocks negative": ({"weight_block_size": [-1, 128]}, "QP-CFG-FIELD", "the integer -1"),
    "blocks huge": ({"weight_block_size": [128, 10**9]}, "QP-CFG-FIELD", "from 1 to 1048576"),
    "four bits": ({"bits": 4}, "QP-CFG-UNKNOWN", "bits is the integer 4, which changes what the tensors mean"),
    "FP4 experts": ({"expert_dtype": "fp4"}, "QP-CFG-UNKNOWN", "expert_dtype is the string 'fp4'"),
    "embeddings": ({"modules_to_convert": ["embed_tokens"]}, "QP-CFG-UNKNOWN", "modules_to_convert is a list of 1"),
    "integer activations": ({"act_data_type": "int"}, "QP-CFG-UNKNOWN", "act_data_type is the string 'int'"),
    "groups of another format": ({"config_groups": {"a": {}}}, "QP-CFG-UNKNOWN", "config_groups is an object"),
    "two lists": (
        {"ignored_layers": ["lm_head"], "modules_to_not_convert": ["gate"]}, "QP-CFG-CONTRADICTION",
        "ignored_layers: lists other layers than .*modules_to_not_convert",
    ),
    "a text for a list": ({"ignored_layers": "lm_head"}, "QP-CFG-FIELD", "is of type str"),
    "an empty text": ({"ignored_layers": [""]}, "QP-SKIP-PATTERN", "would cover every module"),
    "an expression without end": ({"ignored_layers": ["re:(a+)+b"]}, "QP-SKIP-PATTERN", "ignored_layers"),
    "group_size beside blocks": (
        {**DEEPSEEK, "group_size": 128}, "QP-CFG-CONTRADICTION",
        r"group_size is the integer 128, beside weight_block_size \[128, 128\]; expected \[128, 128\]",
    ),
    "group_size without blocks": ({"group_size": 32}, "QP-CFG-CONTRADICTION", "beside no weight_block_size"),
    "group_size false": ({"group_size": False}, "QP-CFG-CONTRADICTION", "group_size is false"),
    "act_dynamic": (
        {"activation_scheme": "static", "act_dynamic": True}, "QP-CFG-CONTRADICTION", "beside activation_scheme 'stat",
    ),
    "scales of another meaning": (
        {**GPTQMODEL, "weight_scale_semantics": "forward"}, "QP-CFG-FIELD",
        "weight_scale_semantics is the string 'forward'; expected one of 'inverse'",
    ),
    "scales shared otherwise": ({**GPTQMODEL, "weight_scale_method": "column"}, "QP-CFG-FIELD", "the string 'column'"),
    "rows beside blocks": (
        {**GPTQMODEL_BLOCKS, "weight_scale_method": "row"}, "QP-CFG-CONTRADICTION",
        r"weight_scale_method is 'row', beside weight_block_size \[128, 128\]",
    ),
    "blocks without a size": (
        {**GPTQMODEL, "weight_scale_method": "block"}, "QP-CFG-CONTRADICTION", "beside no weight_block_size",
    ),
    "groups beside rows": ({**GPTQMODEL, "group_size": 128}, "QP-CFG-CONTRADICTION", "group_size is the integer 128"),
    "two types": (
        {**GPTQMODEL, "fmt": "e5m2"}, "QP-CFG-CONTRADICTION", "'e5m2', beside format and checkpoint_format of another",
    ),
    "codes that are powers of two": ({"format": "float8_e8m0fnu"}, "QP-CFG-FIELD", "the string 'float8_e8m0fnu'"),
    "inputs in another order": ({**GPTQMODEL, "desc_act": True}, "QP-CFG-UNKNOWN", "desc_act is true"),
    "cache unknown": ({"kv_cache_scheme": "int8"}, "QP-CFG-FIELD", "the string 'int8'"),
    "cache an object": ({"kv_cache_scheme": {"num_bits": 8}}, "QP-CFG-FIELD", "an object with 1 keys"),
    "cache of integers": ({"kv_cache_quant_algo": "INT8"}, "QP-CFG-FIELD", "the string 'INT8'"),
    "cache of two types": (
        {"kv_cache_quant_algo": "fp8", "kv_cache_quant_method": "fp8_e5m2"}, "QP-CFG-CONTRADICTION", "does not agree",
    ),
    "cache of a type and none": (
        {"kv_cache_quant_algo": "none", "kv_cache_scheme": "static"}, "QP-CFG-CONTRADICTION", "does not agree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_fields(name):
    """Types are taken as they are written; the message says which key, what it is and what it must be."""
    fields, code, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as caught:
        parse(**fields)
    assert caught.value.code == code
    assert caught.value.where.startswith(WHERE)
    assert ruling(parse(), PATH), "the reader is as before"


def test_layers_that_stay_whole():
    """Either spelling; the head always, a layer's own `output` not; components end at dots."""
    listed = ["model.layers.1.", "mlp.gate", "visual"]
    for lists in ({"ignored_layers": listed}, {"modules_to_not_convert": listed, "ignored_layers": listed[::-1]}):
        config = parse(**lists)
        for path in (
            "lm_head",
            "output",
            "model.layers.1.mlp.up_proj",
            "model.layers.0.mlp.gate",
            "visual.blocks.0.qkv",
        ):
            assert ruling(config, path) is None, path
        for path in (
            "model.layers.10.mlp.up_proj",
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.0.attention.output",
        ):
            assert ruling(config, path) is not None, path
        matcher = Matcher(config.rules, config.default)
        assert {entry.text for entry in matcher.report().unused} == set(listed), "implied heads are never reported"


def test_lists_of_what_is_quantized():
    """auto-round names blocks; everything else stays whole."""
    for spelled in ("model.layers,mtp.layers", ["model.layers", "mtp.layers"]):
        config = parse(block_name_to_quantize=spelled, modules_to_not_convert=["model.layers.3"])
        assert config.default is None
        assert ruling(config, PATH) is not None
        assert ruling(config, "mtp.layers.0.mlp.up_proj") is not None
        assert ruling(config, "model.layers.3.mlp.up_proj") is None
        assert ruling(config, "visual.blocks.0.qkv") is None


E4M3, E5M2 = ElementType.FLOAT8_E4M3FN, ElementType.FLOAT8_E5M2
CACHES = {
    "silent": ({}, None),
    "null": ({"kv_cache_scheme": None, "kv_cache_quant_algo": None}, None),
    "none": ({"kv_cache_quant_algo": "none"}, None),
    "static": ({"kv_cache_scheme": "static"}, ActivationSpec(E4M3, "tensor", dynamic=False)),
    "dynamic": ({"kv_cache_scheme": "dynamic"}, ActivationSpec(E4M3, "tensor", dynamic=True)),
    "a type": ({"kv_cache_quant_algo": "FP8"}, ActivationSpec(E4M3, "tensor", dynamic=False)),
    "a method": ({"kv_cache_quant_method": "fp8_e5m2"}, ActivationSpec(E5M2, "tensor", dynamic=False)),
    "all three": (
        {"kv_cache_quant_method": "fp8_e4m3", "kv_cache_quant_algo": "fp8", "kv_cache_scheme": "dynamic"},
        ActivationSpec(E4M3, "tensor", dynamic=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_of_keys_and_values(name):
    """What the configuration says is handed on, in the words of activations."""
    fields, expected = CACHES[name]
    config = parse(**fields, weight_block_size=None)
    assert (config.kv_cache, config.notes) == (expected, ())


def test_what_is_noted_and_left_out_of_account():
    """Unknown keys, and a wish that another reader has."""
    notes = parse(weight_block_size=None, dequantize=True, colour="blue").notes
    assert notes == (
        f"{WHERE}.colour is not known to this reader and left out of account",
        f"{WHERE}.dequantize tells another reader what to do with the weights; not used here",
    )


def test_fbgemm():
    """One scale per row under its one name, activations per token; the bound of their scales is noted."""
    config = parse(FbgemmDialect(), activation_scale_ub=1200.0, modules_to_not_convert=["self_attn", "lm_head"])
    scheme = ruling(config, PATH)
    assert scheme.describe() == f"fp8 e4m3fn per channel, x float8_e4m3fn {BY_TOKEN}"
    assert scheme.required_suffixes == {"weight", "weight_scale"}
    assert ruling(config, "model.layers.0.self_attn.q_proj") is None
    assert ruling(parse(FbgemmDialect()), "lm_head") is None
    assert len(config.notes) == 1
    assert config.notes[0].startswith(f"{WHERE}.activation_scale_ub caps the scales of activations")
    assert not parse(FbgemmDialect()).notes


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"activation_scale_ub": 0}, "QP-CFG-FIELD", "activation_scale_ub is the integer 0; expected a number above 0"),
        ({"activation_scale_ub": True}, "QP-CFG-FIELD", "activation_scale_ub is true"),
        ({"activation_scale_ub": "1200"}, "QP-CFG-FIELD", "the string '1200'"),
        ({"activation_scheme": "static"}, "QP-CFG-UNKNOWN", "activation_scheme is the string 'static'"),
        ({"weight_block_size": [128, 128]}, "QP-CFG-UNKNOWN", "weight_block_size is a list of 2"),
        ({"modules_to_not_convert": {}}, "QP-CFG-FIELD", "is of type dict"),
    ],
)
def test_bad_fields_of_fbgemm(fields, code, text):
    """The same care for the smaller method."""
    if fields.get("modules_to_not_convert") == {}:
        fields = {"modules_to_not_convert": {"lm_head": True}}
    with pytest.raises(ConfigError, match=text) as caught:
        parse(FbgemmDialect(), **fields)
    assert caught.value.code == code


@pytest.mark.parametrize("method", ["fp8", "FP8", "fbgemm_fp8"])
def test_both_are_found_by_their_method(tmp_path, method):
    """Through the core, which folds case."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    config = resolve_config(tmp_path, build_registry({"quantplug-fp8": plugin}))
    assert config.dialect == method.lower()
    assert config.default.name == "fp8"


def test_the_caller_may_say_what_the_file_does_not(tmp_path):
    """The block size of a file whose configuration lacks it; never another than the file's."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    registry = build_registry({"quantplug-fp8": plugin})
    config = resolve_config(tmp_path, registry, override={"weight_block_size": [64, 64]})
    assert dict(config.default.params)["block_n"] == 64
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": DEEPSEEK}))
    with pytest.raises(ConfigError, match="weight_block_size") as caught:
        resolve_config(tmp_path, registry, override={"weight_block_size": [64, 64]})
    assert caught.value.code == "QP-CFG-OVERRIDE"
