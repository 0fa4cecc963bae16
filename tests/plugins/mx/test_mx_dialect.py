"""
Configurations whose method is mxfp8 or mxfp4: as writers spell them, each field's errors, and what is refused in words.
"""

from __future__ import annotations

import pytest
from mx_files import MX_ACTIVATION

from quantplug.config import RawConfig
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import build_registry
from quantplug.skip import SchemeRef
from quantplug_mx import plugin
from quantplug_mx.dialect import MXFP4Dialect, MXFP8Dialect

WHERE = "config.json: quantization_config"
MXFP8 = SchemeRef("mxfp8", (("activation", MX_ACTIVATION), ("scale_name", "either")))
MXFP4 = SchemeRef("mxfp4", (("scale_name", "either"),))
# As radixark/miles (tools/convert_hf_to_mxfp8.py, 2026) writes it when the last layers are to stay in bfloat16.
WRITTEN = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "mxfp8",
    "weight_block_size": [1, 32],
    "scale_fmt": "ue8m0",
    "modules_to_not_convert": [
        "lm_head", "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate",
        "model.layers.34.", "model.norm",
    ],
}  # fmt: skip
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def parse(dialect, fields: dict[str, object], model: dict[str, object] | None = None):
    origins = {key: f"{WHERE}.{key}" for key in fields}
    return dialect.parse(RawConfig(dialect.name, fields, origins, model or {}, WHERE))


def ruling(config, path: str) -> SchemeRef | None:
    return Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use


def test_a_configuration_as_it_is_written():
    """Every field is known; the lists become rules, and each field is shown with where it stands."""
    config = parse(MXFP8Dialect(), WRITTEN)
    assert (config.dialect, config.default, config.notes) == ("mxfp8", MXFP8, ())
    for whole in ("lm_head", "model.layers.34.mlp.down_proj", "model.layers.34.self_attn.q_proj"):
        assert ruling(config, whole) is None
    for quantized in (
        "model.layers.340.mlp.down_proj", "model.layers.3.mlp.down_proj", "model.layers.0.mlp.gate_proj",
    ):  # fmt: skip
        assert ruling(config, quantized) == MXFP8
    fields = {field.name: (field.value, field.origin) for field in config.fields}
    assert fields["scale_fmt"] == ("ue8m0", f"{WHERE}.scale_fmt")


def test_what_is_absent_has_one_value_only():
    """The method alone says everything; defaults are shown as such, the output head stays whole."""
    config = parse(MXFP8Dialect(), {"quant_method": "mxfp8"})
    assert config.default == MXFP8
    fields = {field.name: (field.value, field.origin) for field in config.fields}
    assert fields["weight_block_size"] == ([1, 32], "default (weight_block_size is absent)")
    assert fields["activation_scheme"] == ("dynamic", "default (activation_scheme is absent)")
    assert ruling(config, "lm_head") is None
    assert ruling(config, "model.layers.0.attention.output") == MXFP8
    assert not Matcher(config.rules, config.default).report().unused


@pytest.mark.parametrize("dialect", [MXFP8Dialect(), MXFP4Dialect()])
def test_both_lists_count(dialect):
    """Writers use `modules_to_not_convert` or `ignored_layers`."""
    fields = {"modules_to_not_convert": ["model.layers.1."], "ignored_layers": ["mlp.gate"]}
    config = parse(dialect, fields)
    assert ruling(config, "model.layers.1.mlp.up_proj") is None
    assert ruling(config, "model.layers.0.mlp.gate") is None
    assert ruling(config, "model.layers.0.mlp.gate_proj") == config.default
    assert [rule.entry.origin for rule in config.rules[:2]] == [
        f"{WHERE}.modules_to_not_convert[0]", f"{WHERE}.ignored_layers[0]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "whole", "quantized"),
    [
        # Inkling2Config of Transformers 5.23 has such an entry
        ("model.layers.*.self_attn", "model.layers.12.self_attn.q_proj", "model.layers.12.self_attn_out.q_proj"),
        ("model.layers.*.mlp.router", "model.layers.12.mlp.router", "model.layers.12.mlp.router_proj"),
        ("model.layers.3?.mlp", "model.layers.34.mlp.up_proj", "model.layers.340.mlp.up_proj"),
        ("model.layers.3[4]*", "model.layers.340.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("*shared*", "model.layers.1.mlp.shared_expert.up_proj", "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_glob_covers_what_lies_below_it(entry, whole, quantized):
    """And ends at a dot; its text is shown as it is written."""
    config = parse(MXFP8Dialect(), {"modules_to_not_convert": [entry]})
    assert config.rules[0].entry.text == entry
    assert ruling(config, whole) is None
    assert ruling(config, quantized) == MXFP8


def test_unknown_keys_are_noted():
    """Left out of account, and said so; what tells one loader what to do is passed over in silence."""
    config = parse(MXFP8Dialect(), {"packed_modules_mapping": {}, "dequantize": False, "date": "2026"})
    assert config.notes == (f"{WHERE}.date is not known to this reader and left out of account",)


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"fmt": "e5m2"}, "QP-CFG-FIELD", "fmt is the string 'e5m2'; expected one of 'e4m3'"),
        ({"scale_fmt": "float"}, "QP-CFG-FIELD", "scale_fmt is the string 'float'"),
        ({"activation_scheme": "static"}, "QP-CFG-FIELD", "expected one of 'dynamic'"),
        ({"activation_scheme": None}, "QP-CFG-FIELD", "activation_scheme is null"),
        (
            {"weight_block_size": [128, 128]}, "QP-CFG-FIELD",
            r"is \[128, 128\]; expected \[1, 32\].*quant_method 'fp8'",
        ),
        ({"weight_block_size": 32}, "QP-CFG-FIELD", "is the integer 32"),
        ({"expert_dtype": "fp4"}, "QP-CFG-REFUSED", "stores experts as the string 'fp4'"),
        ({"modules_to_convert": ["model.embed_tokens"]}, "QP-CFG-UNKNOWN", "modules_to_convert: is a list of 1, which"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "QP-CFG-UNKNOWN", "kv_cache_scheme: is an object"),
        ({"modules_to_not_convert": "lm_head"}, "QP-CFG-FIELD", "a list of texts"),
        ({"ignored_layers": [3]}, "QP-CFG-FIELD", r"ignored_layers\[0\]"),
        ({"modules_to_not_convert": ["."]}, "QP-SKIP-PATTERN", "would cover every module"),
        ({"modules_to_not_convert": ["model..layers."]}, "QP-SKIP-PATTERN", "nothing between them"),
        ({"modules_to_not_convert": ["re:(a+)+$"]}, "QP-SKIP-PATTERN", "in several ways"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_are_refused_with_their_place(fields, code, words):
    """Before anything is planned."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse(MXFP8Dialect(), fields)
    assert caught.value.code == code
    assert caught.value.where.startswith(f"{WHERE}.{next(iter(fields))}")


@pytest.mark.parametrize(
    "model",
    [
        {"model_type": "gpt_oss", "num_local_experts": 32},
        {"model_type": "some_moe", "num_experts": 64},
        {"model_type": "other_moe", "text_config": {"n_routed_experts": 256}},
    ],
)
def test_mxfp4_of_a_model_with_experts_concerns_its_experts_only(model):
    """Whatever the lists leave out: who writes this method quantizes nothing else."""
    config = parse(MXFP4Dialect(), {"quant_method": "mxfp4"}, model)
    assert config.default is None
    assert ruling(config, "model.layers.3.mlp.experts") == MXFP4
    assert ruling(config, "model.layers.3.self_attn.q_proj") is None
    assert ruling(config, "model.layers.3.mlp.no_experts") is None
    skipping = parse(MXFP4Dialect(), {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.3"]}, model)
    assert ruling(skipping, "model.layers.3.mlp.experts") is None


@pytest.mark.parametrize("model", [{}, {"num_local_experts": 1}, {"num_experts": None}, {"text_config": None}])
def test_mxfp4_without_experts_is_a_format_of_linear_layers(model):
    """A model that counts no experts, or one, has linear layers only."""
    config = parse(MXFP4Dialect(), GPT_OSS, model)
    assert (config.dialect, config.default) == ("mxfp4", MXFP4)
    assert ruling(config, "model.layers.3.self_attn.q_proj") is None
    assert ruling(config, "model.layers.3.mlp.up_proj") == MXFP4


def test_the_plugin_offers_its_formats_and_readers():
    """Found through the hooks, by the names that dialects and recipes use."""
    registry = build_registry({"quantplug-mx": plugin})
    assert set(registry.schemes) == {"mxfp8", "mxfp4", "nvfp4"} == set(registry.recipes)
    assert set(registry.dialects) == {"mxfp8", "mxfp4"}
    assert not registry.failures
