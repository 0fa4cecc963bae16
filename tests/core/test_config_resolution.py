"""
From files and the caller's wish to one configuration: who leads, what is merged, and where each field came from.
"""

from __future__ import annotations

import pytest
from config_plugins import Recorder, registry_of, write_files

from quantplug.config import DENSE, read_model_config, resolve_config
from quantplug.errors import ConfigError
from quantplug.skip import SchemeRef

MODEL = {"model_type": "llama"}
MAIN = {"quant_method": "abc", "bits": 4, "group_size": 64}


@pytest.fixture
def abc():
    return Recorder("abc", ("abc", "abc_fast"), ("abc_config.json", "shared_config.json"))


@pytest.fixture
def xyz():
    return Recorder("xyz", ("xyz",), ("hf_quant_config.json", "shared_config.json"))


@pytest.fixture
def registry(abc, xyz):
    return registry_of(abc, xyz)


def origins(config):
    return {field.name: field.origin for field in config.fields}


def values(config):
    return {field.name: field.value for field in config.fields}


def test_a_section_of_config_json_is_read_by_the_dialect_of_its_method(tmp_path, abc, registry):
    write_files(tmp_path, config_json=MODEL | {"quantization_config": MAIN})
    config = resolve_config(str(tmp_path), registry)
    assert (config.dialect, config.default) == ("abc", SchemeRef("abc"))
    assert values(config) == MAIN
    assert origins(config) == {key: f"config.json: quantization_config.{key}" for key in MAIN}
    assert config.notes == ("from the dialect",)
    raw = abc.seen[0]
    assert (raw.method, raw.where) == ("abc", "config.json: quantization_config")
    assert raw.model["model_type"] == "llama"
    assert raw.origin("bits") == "config.json: quantization_config.bits"
    assert raw.origin("sym") == "default (sym is absent)"


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        ({"config_json": {"compression_config": MAIN}}, "config.json: compression_config.bits"),
        ({"config_json": MODEL, "abc_config_json": MAIN}, "abc_config.json: bits"),
        (
            {"config_json": {"text_config": {"quantization_config": MAIN}}},
            "config.json: text_config.quantization_config.bits",
        ),
        ({"config_json": {"quantization_config": None}, "shared_config_json": MAIN}, "shared_config.json: bits"),
        ({"config_json": {"quantization_config": {}}, "abc_config_json": MAIN}, "abc_config.json: bits"),
    ],
)
def test_every_place_alone_is_enough(tmp_path, registry, files, origin):
    write_files(tmp_path, **files)
    config = resolve_config(tmp_path, registry)
    assert config.dialect == "abc"
    assert values(config) == MAIN
    assert origins(config)["bits"] == origin


def test_a_checkpoint_without_any_is_dense(tmp_path, registry):
    write_files(tmp_path, config_json=MODEL | {"text_config": {"a": 1}, "quantization_config": None})
    assert resolve_config(tmp_path, registry) == DENSE
    assert resolve_config(tmp_path, registry, override={}) == DENSE
    assert resolve_config(tmp_path, registry_of()) == DENSE


def test_the_model_configuration_is_returned_whole(tmp_path):
    write_files(tmp_path, config_json=MODEL | {"quantization_config": MAIN})
    assert read_model_config(tmp_path) == MODEL | {"quantization_config": MAIN}


def test_the_dialects_own_file_completes_the_section_and_each_field_keeps_its_origin(tmp_path, registry):
    own = {"bits": 4, "desc_act": False, "quant_method": "ABC"}
    write_files(tmp_path, config_json={"quantization_config": MAIN}, abc_config_json=own)
    config = resolve_config(tmp_path, registry)
    assert values(config) == MAIN | {"desc_act": False}
    assert origins(config)["bits"] == "config.json: quantization_config.bits"
    assert origins(config)["desc_act"] == "abc_config.json: desc_act"


def test_words_that_differ_in_their_case_agree_and_the_leading_spelling_counts(tmp_path, registry):
    """AutoAWQ writes "GEMM" into a file of its own and "gemm" into config.json."""
    main = {**MAIN, "version": "gemm"}
    write_files(tmp_path, config_json={"quantization_config": main}, abc_config_json={"version": "GEMM"})
    assert values(resolve_config(tmp_path, registry)) == main


def test_other_sections_must_agree_but_add_nothing(tmp_path, registry):
    write_files(
        tmp_path,
        config_json={"quantization_config": MAIN, "compression_config": {"bits": 4, "format": "x"}},
        hf_quant_config_json={"producer": {"name": "maker"}, "bits": 4},
    )
    config = resolve_config(tmp_path, registry)
    assert values(config) == MAIN
    assert config.notes[:2] == (
        "config.json: compression_config: format not used, since config.json: quantization_config leads",
        "hf_quant_config.json: producer not used, since config.json: quantization_config leads",
    )


def test_only_quantization_config_is_completed(tmp_path, registry):
    write_files(tmp_path, config_json={"compression_config": MAIN}, abc_config_json={"desc_act": True})
    config = resolve_config(tmp_path, registry)
    assert "desc_act" not in values(config)
    assert "abc_config.json: desc_act not used" in config.notes[0]


def test_a_file_that_only_one_dialect_owns_needs_no_method(tmp_path, abc, registry):
    """AutoGPTQ wrote such files."""
    write_files(tmp_path, config_json=MODEL, abc_config_json={"bits": 4})
    config = resolve_config(tmp_path, registry)
    assert values(config) == {"bits": 4, "quant_method": "abc"}
    assert origins(config)["quant_method"] == "abc_config.json: read by abc only"
    assert abc.seen[0].where == "abc_config.json"


def test_the_method_may_stand_in_the_dialects_own_file_only(tmp_path, registry):
    write_files(tmp_path, config_json={"quantization_config": {"bits": 4}}, abc_config_json={"quant_method": "abc"})
    config = resolve_config(tmp_path, registry)
    assert origins(config) == {
        "bits": "config.json: quantization_config.bits",
        "quant_method": "abc_config.json: quant_method",
    }


def test_the_case_of_a_method_is_normalised_and_noted_and_aliases_are_the_dialects(tmp_path, abc, registry):
    write_files(tmp_path, config_json={"quantization_config": MAIN | {"quant_method": "Abc_Fast"}})
    config = resolve_config(tmp_path, registry)
    assert config.dialect == "abc"
    assert abc.seen[0].method == "abc_fast"
    assert config.notes[0] == "config.json: quantization_config.quant_method is 'Abc_Fast', read as 'abc_fast'"


def test_rules_in_another_order_are_noted_and_bookkeeping_in_another_order_is_not(tmp_path, registry):
    """Some writers sort config.json by key; the first rule that matches may decide."""
    rules = {"b": {"bits": 8}, "a": {}}
    main = MAIN | {"dynamic": rules, "meta": {"x": 1, "y": {}}}
    own = MAIN | {"dynamic": dict(reversed(rules.items())), "meta": {"y": {}, "x": 1}}
    write_files(tmp_path, config_json={"quantization_config": main}, abc_config_json=own)
    config = resolve_config(tmp_path, registry)
    assert list(values(config)["dynamic"]) == ["b", "a"]
    assert config.notes == (
        "abc_config.json: dynamic lists its entries in another order; that of config.json: quantization_config counts",
        "from the dialect",
    )


def test_what_the_caller_states_is_confirmed_or_added(tmp_path, registry):
    write_files(tmp_path, config_json={"quantization_config": MAIN})
    config = resolve_config(tmp_path, registry, override={"bits": 4, "sym": True, "quant_method": "abc"})
    assert values(config) == MAIN | {"sym": True}
    assert origins(config)["sym"] == "caller"
    assert origins(config)["bits"] == "config.json: quantization_config.bits"
    assert "config.json: quantization_config.bits is confirmed by the caller" in config.notes


@pytest.mark.parametrize(("theirs", "callers"), [("ABC", "abc"), ("abc", "ABC")])
def test_the_caller_confirms_a_method_in_any_case(tmp_path, registry, theirs, callers):
    """Readers fold the case of a method, so that neither spelling contradicts the other."""
    write_files(tmp_path, config_json={"quantization_config": MAIN | {"quant_method": theirs}})
    config = resolve_config(tmp_path, registry, override={"quant_method": callers})
    assert config.dialect == "abc"
    assert "config.json: quantization_config.quant_method is confirmed by the caller" in config.notes


def test_the_caller_can_name_a_method_that_the_file_leaves_out(tmp_path, registry):
    write_files(tmp_path, config_json={"quantization_config": {"bits": 4}})
    config = resolve_config(tmp_path, registry, override={"quant_method": "abc"})
    assert config.dialect == "abc"
    assert origins(config)["quant_method"] == "caller"


def test_words_that_name_code_are_dropped_or_noted_and_never_followed(tmp_path, abc, registry):
    model = {
        "auto_map": {"AutoModel": "evil--module.Class"},
        "trust_remote_code": False,
        "vision_config": {"_attn_implementation_internal": "owner/kernels"},
        "quantization_config": MAIN | {"trust_remote_code": True, "backend": "os.system", "kernel": "owner/repo"},
    }
    write_files(tmp_path, config_json=model)
    config = resolve_config(tmp_path, registry)
    assert "trust_remote_code" not in abc.seen[0].fields
    assert abc.seen[0].fields["backend"] == "os.system"
    assert config.notes[:3] == (
        "ignored, since nothing in a checkpoint names code here: config.json: auto_map, "
        "config.json: quantization_config.trust_remote_code, "
        "config.json: vision_config._attn_implementation_internal",
        "config.json: quantization_config.backend is 'os.system': chooses no kernel here, the plan does",
        "config.json: quantization_config.kernel is 'owner/repo': chooses no kernel here, the plan does",
    )


def test_a_dense_checkpoint_notes_them_too(tmp_path, registry):
    write_files(tmp_path, config_json={"auto_map": {"AutoModel": "x.Y"}})
    config = resolve_config(tmp_path, registry)
    assert (config.dialect, config.default, len(config.notes)) == ("", None, 1)


def test_files_beside_that_nobody_reads_are_noted(tmp_path, registry):
    write_files(tmp_path, config_json={"quantization_config": MAIN}, quant_config_json={"bits": 3})
    assert "quant_config.json lies beside; no installed plugin reads it" in resolve_config(tmp_path, registry).notes


def test_a_refused_checkpoint_leaves_a_good_one_readable(tmp_path, registry):
    bad = write_files(tmp_path / "bad", config_json={"quantization_config": {"quant_method": "nope"}})
    good = write_files(tmp_path / "good", config_json={"quantization_config": MAIN})
    with pytest.raises(ConfigError):
        resolve_config(bad, registry)
    assert values(resolve_config(good, registry)) == MAIN
