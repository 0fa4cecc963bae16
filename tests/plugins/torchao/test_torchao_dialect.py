"""
torchao configurations: spellings of several versions, names and expressions, notes, and each error.
"""

from __future__ import annotations

import copy

import pytest
from torchao_files import CASES, FORMS, WHERE, WITNESS, parse, parse_type

from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug_torchao.refusals import CONFIGURATIONS
from quantplug_torchao.scheme import TorchaoScheme

PLACE = f"{WHERE}.quant_type.default"
LAYER = "model.layers.0.mlp.up_proj"


def use_of(config, path=LAYER):
    """Return how a layer is stored, in words, or None where it stays whole."""
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    return None if use is None else TorchaoScheme.build(dict(use.params), "test").describe()


def form(name, version=2, /, **fields):
    return {"_type": name, "_version": version, "_data": fields}


def named(kind, name):
    return {"_type": kind, "_data": name}


def changed(case, **fields):
    """Return the configuration of a golden case with some fields changed."""
    value = copy.deepcopy(CASES[case]["quant_type"]["default"])
    value["_data"] |= fields
    return value


INT8 = form("Int8WeightOnlyConfig")
DEFAULTS = {
    "Int8WeightOnlyConfig": "torchao int8 per channel sym",
    "Int8DynamicActivationInt8WeightConfig": "torchao int8 per channel sym, x int8 per token, dynamic",
    "IntxWeightOnlyConfig": "torchao int8 per channel sym",
    "Int8DynamicActivationIntxWeightConfig": "torchao int8 group 32 sym, x uint8 per token, dynamic",
    "Float8WeightOnlyConfig": "torchao float8_e4m3fn per channel",
    "Float8DynamicActivationFloat8WeightConfig": "torchao float8_e4m3fn per tensor, x float8_e4m3fn per tensor, "
    "dynamic",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_fields_mean_what_they_mean_in_torchao(name):
    """Version 0.15 wrote fewer fields than 0.18; what is absent has the default of the class."""
    config = parse_type(form(name))
    assert use_of(config) == DEFAULTS[name]
    assert config.notes == ()


def test_fields_of_older_versions_that_kept_their_default_are_accepted():
    """`layout` was a field of version 1, and was written with version 2, too, up to 0.15."""
    layout = {"_type": "PlainLayout", "_data": {}}
    assert (
        use_of(parse_type(changed("int8-dynamic", layout=layout))) == DEFAULTS["Int8DynamicActivationInt8WeightConfig"]
    )
    layout = {"_type": "QDQLayout", "_data": {}}
    assert use_of(parse_type(changed("int4-group", layout=layout))) == "torchao int4 group 32 sym"


def test_zero_points_that_a_caller_chose_are_read_whatever_the_mapping_says():
    assert use_of(parse_type(changed("int4-group", intx_choose_qparams_algorithm=None))) == "torchao int4 group 32 asym"


def test_the_output_head_stays_whole_unless_a_list_says_what_does():
    config = parse({"quant_type": {"default": INT8}, "modules_to_not_convert": None})
    assert use_of(config, "lm_head") is None
    assert use_of(config, "model.layers.0.output") is not None
    config = parse({"quant_type": {"default": INT8}, "modules_to_not_convert": ["model.layers.0"]})
    assert use_of(config, "lm_head") is not None
    assert use_of(config) is None
    assert use_of(config, "model.layers.1.mlp.up_proj") is not None
    assert use_of(parse({"quant_type": {"default": INT8}, "modules_to_not_convert": []}), "lm_head") is not None


def test_a_configuration_for_each_name():
    """As Transformers writes it: weights, modules, expressions in their order, and the rest."""
    config = parse(FORMS["mixed"])
    assert use_of(config, "model.layers.0.mlp.up_proj") == "torchao int8 per channel sym"
    assert use_of(config, "model.layers.0.mlp.down_proj") == "torchao float8_e4m3fn per channel"
    assert use_of(config, "model.layers.1.self_attn.o_proj") == "torchao int4 group 32 sym"
    assert use_of(config, "model.layers.1.self_attn.q_proj") is None
    rest = "torchao int4 group 32 sym, x uint8 per token, dynamic"
    assert use_of(config, "model.layers.0.self_attn.q_proj") == rest
    # an expression must match the whole name
    assert use_of(config, "other.model.layers.0.self_attn.o_proj") == rest
    assert use_of(config, "lm_head") is None
    assert config.notes == (
        f"{PLACE}: Transformers sorts the expressions, so that the first that matches may be another one",
    )


def mixed(**names):
    return form("ModuleFqnToConfig", 1, module_fqn_to_config=names)


def test_a_name_of_a_weight_counts_before_that_of_its_module_and_both_before_expressions():
    names = {"re:.*up_proj": None, LAYER: INT8, f"{LAYER}.weight": form("Float8WeightOnlyConfig")}
    config = parse_type(mixed(**names))
    assert use_of(config) == "torchao float8_e4m3fn per channel"
    assert use_of(config, "model.layers.1.mlp.up_proj") is None
    assert config.default is None
    assert config.notes == ()  # one expression has no order
    del names[f"{LAYER}.weight"]
    assert use_of(parse_type(mixed(**names))) == "torchao int8 per channel sym"


def test_an_expression_must_match_the_whole_path():
    config = parse_type(mixed(**{"re:.*mlp": INT8, r"re:model\.layers\.0\.self_attn\.q_proj.weight": INT8}))
    assert use_of(config) is None
    assert use_of(config, "model.layers.0.self_attn.q_proj") == "torchao int8 per channel sym"


NOTES = {
    "a key of another tool": (
        {"quant_type": {"default": INT8}, "made_by": "someone"},
        f"{WHERE}.made_by is not known to this reader and left out of account",
    ),
    "7 bits": (
        {"quant_type": CASES["int8-dynamic-reduced"]["quant_type"]},
        f"{PLACE}.reduce_range: x is rounded to 7 bits, which no kernel here does; it keeps its precision",
    ),
    "bounds": (
        {"quant_type": CASES["float8-dynamic-bounded"]["quant_type"]},
        f"{PLACE}.activation_value_ub: scales of x are kept within bounds, which no kernel here does; it keeps its "
        "precision",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_left_out_of_account_is_noted(name):
    fields, note = NOTES[name]
    config = parse(fields)
    assert config.notes == (note,)
    assert ", x " not in use_of(config)


@pytest.mark.parametrize("name", WITNESS["cases"])
def test_every_field_of_a_real_configuration_is_listed_with_its_origin(name):
    section = WITNESS["cases"][name]["quantization_config"]
    config = parse(section)
    assert {field.name for field in config.fields} == section.keys()
    assert all(field.origin == f"{WHERE}.{field.name}" for field in config.fields)
    assert config.notes == ()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_that_are_known_and_not_read_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError) as caught:
        parse_type(form(name))
    assert (caught.value.code, caught.value.where) == ("QP-CFG-REFUSED", f"{PLACE}._type")
    assert caught.value.what == f"{name}: {CONFIGURATIONS[name]}"


FIRST = form("Int8WeightOnlyConfig", 1)
ROW = {"_type": "PerRow", "_data": {"dim": -1}}
BLOCK = {"_type": "PerBlock", "_data": {"block_size": [1, 128]}}
TYPES = {
    "an unknown class": (form("os.system"), "QP-CFG-REFUSED", "not a configuration that this reader knows"),
    "version 1": (FIRST, "QP-CFG-REFUSED", "_version: is 1: its tensors are of other classes"),
    "no version": ({"_type": "Int8WeightOnlyConfig", "_data": {}}, "QP-CFG-REFUSED", "_version: is 1"),
    "version 3": (form("Int8WeightOnlyConfig", 3), "QP-CFG-REFUSED", "_version: is 3"),
    "version a text": (form("Int8WeightOnlyConfig", "2"), "QP-CFG-FIELD", "_version is the string '2'"),
    "no object": (None, "QP-CFG-FIELD", "is null; expected an object with _type and _data"),
    "no class": ({"_data": {}}, "QP-CFG-FIELD", "_type is missing"),
    "no fields": ({"_type": "Int8WeightOnlyConfig", "_version": 2}, "QP-CFG-FIELD", "_data is missing"),
    "fields of no object": (
        {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": 3}, "QP-CFG-FIELD", "_data is the integer 3",
    ),
    "a fourth key": ({**INT8, "_module": "os"}, "QP-CFG-UNKNOWN", "_module: is the string 'os'"),
    "an unknown field": (
        form("Int8WeightOnlyConfig", act_pre_scale=1), "QP-CFG-UNKNOWN", "act_pre_scale: is the integer 1",
    ),
    "group_size of version 1": (form("Int8WeightOnlyConfig", group_size=32), "QP-CFG-REFUSED", "null, and the size in"),
    "a scale for each input": (
        form("Int8WeightOnlyConfig", granularity={"_type": "PerRow", "_data": {"dim": 0}}), "QP-CFG-REFUSED",
        "granularity.dim: is 0: not one scale for each output; expected -1 or 1",
    ),
    "another axis": (
        changed("int4-group", granularity={"_type": "PerAxis", "_data": {"axis": 1}}), "QP-CFG-REFUSED", "axis: is 1",
    ),
    "an unknown granularity": (
        form("Int8WeightOnlyConfig", granularity={"_type": "PerToken", "_data": {}}), "QP-CFG-REFUSED", "PerToken: not",
    ),
    "a granularity with more": (
        form("Int8WeightOnlyConfig", granularity={"_type": "PerTensor", "_data": {"dim": 1}}), "QP-CFG-UNKNOWN", "dim:",
    ),
    "groups of none": (
        changed("int4-group", granularity={"_type": "PerGroup", "_data": {"group_size": 0}}), "QP-CFG-FIELD",
        "group_size is the integer 0; expected an integer, at least 1",
    ),
    "half a block": (
        changed("float8-dynamic", granularity={"_type": "PerBlock", "_data": {"block_size": [128]}}), "QP-CFG-FIELD",
        "block_size: is a list of 1",
    ),
    "a block of truth": (
        changed("float8-dynamic", granularity={"_type": "PerBlock", "_data": {"block_size": [True, 128]}}),
        "QP-CFG-FIELD", "both above 0",
    ),
    "x in blocks of rows": (
        changed("float8-dynamic", granularity={"_type": "PerBlock", "_data": {"block_size": [128, 128]}}),
        "QP-CFG-REFUSED", "x in blocks of 128 rows",
    ),
    "three granularities": (
        changed("float8-dynamic", granularity=[ROW, ROW, BLOCK]), "QP-CFG-FIELD", "is a list of 3; expected an object",
    ),
    "nine bits": (
        changed("int4-group", weight_dtype=named("torch.dtype", "int9")), "QP-CFG-FIELD", "_data is the string 'int9'",
    ),
    "unsigned": (changed("int4-group", weight_dtype=named("torch.dtype", "uint4")), "QP-CFG-FIELD", "'uint4'"),
    "fnuz": (
        changed("float8", weight_dtype=named("torch.dtype", "float8_e4m3fnuz")), "QP-CFG-FIELD", "'float8_e4m3fnuz'",
    ),
    "a dtype of another class": (
        changed("float8", weight_dtype=named("MappingType", "float8_e4m3fn")), "QP-CFG-FIELD", "is 'MappingType'",
    ),
    "a dtype as a text": (changed("float8", weight_dtype="float8_e4m3fn"), "QP-CFG-FIELD", "is the string"),
    "an unknown mapping": (
        changed("int4-group", mapping_type=named("MappingType", "LOG")), "QP-CFG-FIELD", "'LOG'; expected one of",
    ),
    "symmetric x of integers": (
        changed("int4-dynamic", act_mapping_type=named("MappingType", "SYMMETRIC")), "QP-CFG-FIELD", "'ASYMMETRIC'",
    ),
    "packed for a processor": (
        changed("int4-dynamic", intx_packing_format=named("IntxPackingFormat", "OPAQUE_TORCHAO_AUTO")),
        "QP-CFG-REFUSED", "is OPAQUE_TORCHAO_AUTO: bytes as a library packed them",
    ),
    "sparse": (
        changed("float8-dynamic-row", packing_format=named("Float8PackingFormat", "SPARSE_2D_DATA_2D_METADATA")),
        "QP-CFG-REFUSED", "half of the weights are left out",
    ),
    "a layout": (
        changed("int8-dynamic", layout={"_type": "SemiSparseLayout", "_data": {}}), "QP-CFG-REFUSED",
        "is SemiSparseLayout: codes in another order",
    ),
    "no names": (form("FqnToConfig", 1), "QP-CFG-FIELD", "names no module"),
    "two different lists": (
        form("FqnToConfig", 1, fqn_to_config={"a": INT8}, module_fqn_to_config={"b": INT8}), "QP-CFG-CONTRADICTION",
        "module_fqn_to_config: differs from fqn_to_config",
    ),
    "another field beside names": (
        form("FqnToConfig", 1, fqn_to_config={"a": INT8}, order=1), "QP-CFG-UNKNOWN", "order: is the integer 1",
    ),
    "names within names": (
        mixed(a=mixed(b=INT8)), "QP-CFG-REFUSED", "module_fqn_to_config['a']._type: ModuleFqnToConfig: not",
    ),
    "an embedding": (
        mixed(**{"model.embed_tokens": INT8}), "QP-CFG-REFUSED", "model.embed_tokens is an embedding; expected linear",
    ),
    "no name": (mixed(**{".weight": INT8}), "QP-SKIP-PATTERN", "names no module"),
    "an empty expression": (mixed(**{"re:.weight": INT8}), "QP-SKIP-PATTERN", "is an expression without text"),
    "a malformed expression": (mixed(**{"re:(": INT8}), "QP-SKIP-PATTERN", "is malformed"),
    "an expression without bound": (mixed(**{"re:(a+)+b": INT8}), "QP-SKIP-PATTERN", "(a+)+b"),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_configurations_that_are_not_certain(name):
    value, code, text = TYPES[name]
    with pytest.raises(ConfigError) as caught:
        parse_type(value)
    assert caught.value.code == code, caught.value
    assert text in str(caught.value)
    assert caught.value.where.startswith(PLACE)


SECTIONS = {
    "no configuration": ({}, "QP-CFG-FIELD", "quant_type is missing"),
    "a name": ({"quant_type": "int8_weight_only"}, "QP-CFG-REFUSED", "is the string 'int8_weight_only': a name whose"),
    "other keys": ({"quant_type": {"default": INT8, "vision": INT8}}, "QP-CFG-FIELD", "has the keys ['default', 'vis"),
    "unwrapped": ({"quant_type": INT8}, "QP-CFG-FIELD", "expected the one key 'default'"),
    "arguments": (
        {"quant_type": {"default": INT8}, "quant_type_kwargs": {"group_size": 32}}, "QP-CFG-UNKNOWN", "beside a config",
    ),
    "embeddings": (
        {"quant_type": {"default": INT8}, "include_input_output_embeddings": True}, "QP-CFG-REFUSED",
        "embeddings are quantized, too",
    ),
    "embeddings, as older versions say it": (
        {"quant_type": {"default": INT8}, "include_embedding": True}, "QP-CFG-REFUSED", "embeddings are quantized, too",
    ),
    "embeddings a text": (
        {"quant_type": {"default": INT8}, "include_embedding": "no"}, "QP-CFG-FIELD", "expected true or false",
    ),
    "a list of one": (
        {"quant_type": {"default": INT8}, "modules_to_not_convert": "lm_head"}, "QP-CFG-FIELD", "a list of texts",
    ),
    "a list of nothing": (
        {"quant_type": {"default": INT8}, "modules_to_not_convert": [""]}, "QP-SKIP-PATTERN", "an empty text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_that_are_not_certain(name):
    fields, code, text = SECTIONS[name]
    with pytest.raises(ConfigError) as caught:
        parse(fields)
    assert caught.value.code == code, caught.value
    assert text in str(caught.value)


def test_empty_arguments_of_older_versions_say_nothing():
    assert use_of(parse({"quant_type": {"default": INT8}, "quant_type_kwargs": {}})) == "torchao int8 per channel sym"
