"""
Configurations: each field's values and errors, rules in their order, and what `write` spells, parsed again.
"""

from __future__ import annotations

import json

import pytest

from quantplug.config import RawConfig, resolve_config
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import registry
from quantplug.skip import SchemeRef
from quantplug_gptq.dialect import GPTQDialect
from quantplug_gptq.scheme import GPTQScheme

GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 64}
WHERE = "config.json: quantization_config"


def parse(method: str = "gptq", **fields: object):
    fields = {**GOOD, **fields}
    return GPTQDialect().parse(RawConfig(method, fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE))


def ruling(config, path: str, *shards: str) -> GPTQScheme | None:
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear", shards=shards)).use
    return None if use is None else GPTQScheme.build(dict(use.params), path)


def test_defaults():
    """Symmetric, version 1, no act-order, the head whole; each default is listed as one."""
    config = parse()
    assert ruling(config, "model.layers.0.mlp.up_proj") == GPTQScheme(4, 64)
    fields = {field.name: (field.value, field.origin) for field in config.fields}
    assert fields["bits"] == (4, f"{WHERE}.bits")
    assert fields["sym"] == (True, "default (sym is absent)")
    assert fields["checkpoint_format"] == ("gptq", "default (checkpoint_format is absent)")
    assert fields["lm_head"] == (False, "default (lm_head is absent)")


ACCEPTED = {
    "two bits per channel": ({"bits": 2, "group_size": -1}, GPTQScheme(2, -1)),
    "asymmetric act-order": ({"sym": False, "desc_act": True}, GPTQScheme(4, 64, sym=False, desc_act=True)),
    "version 2": ({"checkpoint_format": "gptq_v2"}, GPTQScheme(4, 64, checkpoint_format="gptq_v2")),
    "version 2 as format": ({"format": "gptq_v2"}, GPTQScheme(4, 64, checkpoint_format="gptq_v2")),
    "both names": (
        {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}, GPTQScheme(4, 64, checkpoint_format="gptq_v2"),
    ),
    "not in Marlin's layout": ({"is_marlin_format": False}, GPTQScheme(4, 64)),
    "GPTQModel's own": ({"meta": {"quantizer": ["gptqmodel:7.7.0"]}}, GPTQScheme(4, 64, zeros_offset="word")),
    "GPTQModel under Optimum": (
        {"meta": {"quantizer": ["optimum:1.24.0", "GPTQModel:2.0"]}}, GPTQScheme(4, 64, zeros_offset="word"),
    ),
    "GPTQModel, as a text": ({"meta": {"quantizer": "gptqmodel:1.1.0"}}, GPTQScheme(4, 64, zeros_offset="word")),
    "GPTQModel, three bits": ({"bits": 3, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}, GPTQScheme(3, 64)),
    "GPTQModel, version 2": (
        {"format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
        GPTQScheme(4, 64, checkpoint_format="gptq_v2"),
    ),
    "another writer": ({"meta": {"quantizer": ["autogptq:0.7.1"]}}, GPTQScheme(4, 64)),
    "no writer": ({"meta": {}}, GPTQScheme(4, 64)),
    "int32 words": ({"pack_dtype": "int32"}, GPTQScheme(4, 64)),
    "nulls that say nothing": ({"adapter": None, "dynamic": None, "rotation": None, "meta": None}, GPTQScheme(4, 64)),
    "bookkeeping": ({"damp_percent": 0.01, "true_sequential": True, "dataset": "c4", "mse": 2.4}, GPTQScheme(4, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted(name):
    """Fields as writers write them, and the parameters they mean; every key is listed and none is remarked upon."""
    fields, scheme = ACCEPTED[name]
    config = parse(**fields)
    assert ruling(config, "model.layers.0.mlp.up_proj") == scheme
    assert {"quant_method", *fields} <= {field.name for field in config.fields}
    assert config.notes == ()


REFUSED = {
    "bits missing": ({"bits": ...}, "QP-CFG-FIELD", "bits is missing"),
    "bits a text": ({"bits": "4"}, "QP-CFG-FIELD", "bits is the string '4'"),
    "bits true": ({"bits": True}, "QP-CFG-FIELD", "bits is true"),
    "bits 6": ({"bits": 6}, "QP-CFG-FIELD", "one of 2, 3, 4, 8"),
    "group 0": ({"group_size": 0}, "QP-CFG-FIELD", "group_size is the integer 0"),
    "group null": ({"group_size": None}, "QP-CFG-FIELD", "group_size is null"),
    "sym a text": ({"sym": "false"}, "QP-CFG-FIELD", "sym is the string 'false'"),
    "desc_act null": ({"desc_act": None}, "QP-CFG-FIELD", "desc_act is null"),
    "lm_head 1": ({"lm_head": 1}, "QP-CFG-FIELD", "lm_head is the integer 1"),
    "format unknown": ({"checkpoint_format": "gptq_v9"}, "QP-CFG-UNKNOWN", "'gptq_v9' is not a known layout"),
    "format a number": ({"format": 2}, "QP-CFG-FIELD", "format is the integer 2"),
    "formats that differ": (
        {"format": "gptq", "checkpoint_format": "gptq_v2"}, "QP-CFG-CONTRADICTION",
        "format: is 'gptq', while .*checkpoint_format is 'gptq_v2'; .*how zero points are read",
    ),
    "Marlin by format": ({"checkpoint_format": "marlin"}, "QP-CFG-REFUSED", "'marlin' is not read.*convert the dense"),
    "Marlin by flag": ({"is_marlin_format": True}, "QP-CFG-REFUSED", "is_marlin_format: the layout 'marlin'"),
    "Marlin by method key": ({"method": "marlin"}, "QP-CFG-REFUSED", "method: the layout 'marlin'"),
    "bit planes": ({"format": "gptq_p"}, "QP-CFG-REFUSED", "bit planes"),
    "QQQ": ({"method": "qqq"}, "QP-CFG-REFUSED", "activations are quantized"),
    "another method": ({"method": "awq"}, "QP-CFG-CONTRADICTION", "'awq', while quant_method is 'gptq'"),
    "64-bit words": ({"pack_dtype": "int64"}, "QP-CFG-UNKNOWN", "pack_dtype is the string 'int64'.*expected 'int32'"),
    "LoRA": ({"adapter": {"rank": 8}}, "QP-CFG-UNKNOWN", "adapter is an object with 1 keys, which changes"),
    "rotation": ({"rotation": "hadamard"}, "QP-CFG-UNKNOWN", "rotation is the string 'hadamard'"),
    "quantized cache": ({"kv_cache_scheme": {"bits": 8}}, "QP-CFG-UNKNOWN", "kv_cache_scheme"),
    "quantized activations": ({"act_bits": 8}, "QP-CFG-UNKNOWN", "act_bits is the integer 8"),
    "dynamic a list": ({"dynamic": ["-:x"]}, "QP-CFG-FIELD", "dynamic is a list of 1"),
    "dynamic without overrides": ({"dynamic": {"+:x": 8}}, "QP-CFG-FIELD", r"dynamic\[0\]: is the integer 8"),
    "dynamic bits": ({"dynamic": {"+:x": {"bits": 7}}}, "QP-CFG-FIELD", r"dynamic\[0\].bits: bits is the integer 7"),
    "dynamic group": ({"dynamic": {"x": {"group_size": 0}}}, "QP-CFG-FIELD", r"dynamic\[0\].group_size"),
    "dynamic format": (
        {"dynamic": {"-:y": {}, "x": {"checkpoint_format": "gptq_v2"}}}, "QP-CFG-UNKNOWN",
        r"dynamic\[1\].checkpoint_format: .*one module cannot choose",
    ),
    "dynamic words": ({"dynamic": {"x": {"pack_dtype": "int8"}}}, "QP-CFG-UNKNOWN", r"dynamic\[0\].pack_dtype"),
    "dynamic without text": ({"dynamic": {"-:": {}}}, "QP-SKIP-PATTERN", "would cover every module"),
    "dynamic malformed": ({"dynamic": {"-:(": {}}}, "QP-SKIP-PATTERN", r"dynamic\[0\]"),
    "dynamic without bound": ({"dynamic": {"-:(.*a.*)*b": {}}}, "QP-SKIP-PATTERN", r"dynamic\[0\]"),
    "modules not a list": ({"modules_in_block_to_quantize": 3}, "QP-CFG-FIELD", "modules_in_block_to_quantize"),
    "modules nested wrongly": ({"modules_in_block_to_quantize": [["a", 3]]}, "QP-CFG-FIELD", r"quantize\[0\]\[1\]"),
    "modules empty text": ({"modules_in_block_to_quantize": [""]}, "QP-SKIP-PATTERN", "an empty text"),
    "meta a text": ({"meta": "gptqmodel"}, "QP-CFG-FIELD", "meta is the string"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    """Each with its code, the place, and what must be there; a good configuration parses afterwards."""
    fields, code, text = REFUSED[name]
    given = {key: value for key, value in {**GOOD, **fields}.items() if value is not ...}
    raw = RawConfig("gptq", given, {key: f"{WHERE}.{key}" for key in given}, {}, WHERE)
    with pytest.raises(ConfigError, match=text) as caught:
        GPTQDialect().parse(raw)
    assert caught.value.code == code
    assert caught.value.where.startswith((WHERE, "default"))
    assert parse().default is not None


def test_a_marlin_method_is_refused():
    """The method itself may name the layout."""
    with pytest.raises(ConfigError, match="'marlin' is not read") as caught:
        parse("marlin")
    assert caught.value.code == "QP-CFG-REFUSED"


def test_unknown_keys_are_noted():
    """What nobody has heard of is neither an error nor silent."""
    assert parse(colour="blue").notes == (f"{WHERE}.colour is not known to this reader and left out of account",)


def test_the_head_stays_whole_unless_the_file_says_otherwise():
    """An implied rule: reported as the decider, never as unused."""
    assert ruling(parse(), "lm_head") is None
    assert ruling(parse(lm_head=False), "model.language_model.lm_head") is None
    assert ruling(parse(lm_head=True), "lm_head") == GPTQScheme(4, 64)
    assert ruling(parse(), "model.layers.0.output") is not None
    matcher = Matcher(parse().rules, parse().default)
    matcher.decide(ModuleInfo("model.layers.0.mlp.up_proj", "linear"))
    assert matcher.report().unused == ()


DYNAMIC = {
    "-:.*\\.k_proj": {},
    "+:.*\\.down_proj": {"bits": 8, "group_size": 32},
    "-:.*layers\\.0\\..*": {},
    "lm_head": {"bits": 8, "sym": False, "mse": 2.4},
    "-:q_proj": {},
}


def test_dynamic_rules_apply_in_the_order_of_the_file():
    """The first match decides; expressions start at the start of the path; bare keys override."""
    config = parse(dynamic=DYNAMIC)
    assert ruling(config, "model.layers.3.self_attn.k_proj") is None
    assert ruling(config, "model.layers.0.mlp.down_proj") == GPTQScheme(8, 32)
    assert ruling(config, "model.layers.0.mlp.up_proj") is None
    assert ruling(config, "model.layers.10.mlp.up_proj") == GPTQScheme(4, 64)
    assert ruling(config, "model.layers.3.self_attn.q_proj") == GPTQScheme(4, 64), "q_proj is anchored at the start"
    assert ruling(config, "lm_head") == GPTQScheme(8, 64, sym=False), "counts before the implied rule"


def test_an_override_to_or_from_three_bits_keeps_the_right_zero_points():
    """GPTQModel subtracts words for all widths but 3."""
    config = parse(meta={"quantizer": ["gptqmodel:7.7.0"]}, dynamic={"+:.*a$": {"bits": 3}})
    assert ruling(config, "layers.a") == GPTQScheme(3, 64)
    assert ruling(config, "layers.b") == GPTQScheme(4, 64, zeros_offset="word")


def test_positive_lists():
    """Flat or nested; what they do not name stays whole; the head is named by lm_head."""
    for spelled in (["self_attn.q_proj", "mlp.down_proj"], [["self_attn.q_proj"], ["mlp.down_proj"]]):
        config = parse(modules_in_block_to_quantize=spelled)
        assert config.default is None
        assert ruling(config, "model.layers.0.mlp.down_proj") == GPTQScheme(4, 64)
        assert ruling(config, "model.layers.0.mlp.up_proj") is None
        assert ruling(config, "lm_head") is None
    assert ruling(parse(modules_in_block_to_quantize=["mlp.up_proj"], lm_head=True), "lm_head") == GPTQScheme(4, 64)
    assert parse(modules_in_block_to_quantize=[]).default is not None


def test_blocks_and_modules_in_them():
    """A block covers what lies below it; with both lists, modules count within the blocks."""
    blocks = parse(block_name_to_quantize="model.layers")
    assert ruling(blocks, "model.layers.0.mlp.up_proj") == GPTQScheme(4, 64)
    assert ruling(blocks, "vision_tower.blocks.0.mlp.up_proj") is None
    both = parse(block_name_to_quantize="model.layers, model.more", modules_in_block_to_quantize=[["mlp.up_proj"]])
    assert ruling(both, "model.layers.0.mlp.up_proj") == GPTQScheme(4, 64)
    assert ruling(both, "model.more.mlp.up_proj") == GPTQScheme(4, 64)
    assert ruling(both, "model.layers.0.mlp.down_proj") is None
    assert ruling(both, "vision_tower.layers.0.mlp.up_proj") is None
    assert ruling(both, "model.layers_too.0.mlp.up_proj") is None


def test_overrides_beside_a_positive_list_are_remarked_upon():
    """auto-round writes both."""
    config = parse(dynamic={"+:.*down_proj": {"bits": 8}}, modules_in_block_to_quantize=["mlp.down_proj"])
    assert ruling(config, "model.layers.0.mlp.down_proj") == GPTQScheme(8, 64)
    assert "counts before the list" in config.notes[0]


def test_modules_to_not_convert_stay_whole():
    """A list that other formats have and some writers add."""
    config = parse(modules_to_not_convert=["mlp.gate"])
    assert ruling(config, "model.layers.0.mlp.gate") is None
    assert ruling(config, "model.layers.0.mlp.gate_proj") == GPTQScheme(4, 64)


def test_what_is_written_parses_to_the_same_rules():
    """For every layer of a converted checkpoint: mixed parameters, layers left whole, a quantized head."""
    base = SchemeRef("gptq", (("bits", 4), ("group_size", 64), ("sym", False)))
    eight = SchemeRef("gptq", (("bits", 8), ("group_size", 32)))
    layers = {"model.layers.0.mlp.up_proj": base, "model.layers.0.mlp.down_proj": eight, "lm_head": eight}
    dense = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate"]
    section = json.loads(json.dumps(GPTQDialect().write(base, layers, dense)))
    config = parse(**section)
    for path, ref in layers.items():
        assert ruling(config, path) == GPTQScheme.build(dict(ref.params), path)
    assert [ruling(config, path) for path in dense] == [None, None]
    assert ruling(config, "model.layers.1.mlp.gate_proj") == GPTQScheme.build(dict(base.params), "base")
    assert config.notes == ()
    assert section["lm_head"] is True


def test_an_ordinary_conversion_is_written_without_rules():
    """Only the head stays whole, which needs no rule."""
    base = SchemeRef("gptq", (("bits", 4), ("group_size", 64)))
    section = GPTQDialect().write(base, {"model.layers.0.mlp.up_proj": base}, ["lm_head"])
    assert "dynamic" not in section
    assert section["lm_head"] is False
    assert ruling(parse(**section), "lm_head") is None


def test_a_dense_head_beside_a_quantized_one_is_written():
    """Two heads, one of them whole: then it needs a rule."""
    base = SchemeRef("gptq", (("bits", 4), ("group_size", 64)))
    config = parse(**GPTQDialect().write(base, {"lm_head": base}, ["draft.lm_head"]))
    assert ruling(config, "lm_head") == GPTQScheme(4, 64)
    assert ruling(config, "draft.lm_head") is None


def test_one_file_cannot_mix_versions_of_zero_points():
    """The key is one for the whole file."""
    base = SchemeRef("gptq", (("bits", 4), ("group_size", 64)))
    other = SchemeRef("gptq", (*base.params, ("checkpoint_format", "gptq_v2")))
    with pytest.raises(ConfigError, match="'gptq_v2' for one layer and 'gptq' for the rest") as caught:
        GPTQDialect().write(base, {"a": base, "b": other}, [])
    assert caught.value.code == "QP-CFG-CONTRADICTION"


def test_config_json_and_quantize_config_json_together(tmp_path):
    """Either alone, both when they agree, an error that names both when they do not."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": GOOD}))
    beside = tmp_path / "quantize_config.json"
    beside.write_text(json.dumps({**GOOD, "desc_act": True}))
    config = resolve_config(tmp_path, registry())
    assert ruling(config, "model.layers.0.mlp.up_proj") == GPTQScheme(4, 64, desc_act=True)
    beside.write_text(json.dumps({**GOOD, "bits": 8}))
    with pytest.raises(ConfigError, match="bits") as caught:
        resolve_config(tmp_path, registry())
    assert caught.value.code == "QP-CFG-CONTRADICTION"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    old = {"bits": 8, "group_size": 128, "desc_act": False}  # what AutoGPTQ wrote before it named the method
    beside.write_text(json.dumps(old))
    assert ruling(resolve_config(tmp_path, registry()), "model.layers.0.mlp.up_proj") == GPTQScheme(8, 128)


def test_an_alias_of_the_method(tmp_path):
    """Engines' own name for plain GPTQ files."""
    fields = {**GOOD, "quant_method": "gptq_marlin"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fields}))
    assert resolve_config(tmp_path, registry()).dialect == "gptq"
