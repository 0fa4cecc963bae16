"""
What the readers make of sections that are odd, hostile, or not theirs; and Transformers' own function beside ours.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from quantplug.plugins import build_registry
from quantplug_peers import plugin
from quantplug_peers.sglang import SGLangReader
from quantplug_peers.transformers import TransformersReader
from quantplug_peers.vllm import VLLMReader

READERS = (TransformersReader(), VLLMReader(), SGLangReader())
PATH = "model.layers.0.self_attn.q_proj"
FUSED = "model.layers.0.self_attn.qkv_proj"

COMPONENTS = st.sampled_from(
    ["model", "layers", "0", "1", "11", "mlp", "gate", "gate_proj", "qkv", "lm_head", "visual"]
)
PATHS = st.lists(COMPONENTS, min_size=1, max_size=5).map(".".join)
ENTRIES = st.one_of(
    PATHS,
    PATHS.map(lambda path: path + "."),
    st.text(alphabet="mlpgate01.*?[]()+|^$\\d_", min_size=1, max_size=9),
    st.sampled_from(["layers.*", r".*\.mlp\..*", "model|lm_head", "*.mlp.*", "gate", "(a", ".", "l.y"]),
)


def convert(path, entries):
    """Transformers' own answer; "error" when it raises for some order of the list, which it does not fix."""
    try:
        answers = {should_convert_module(path, [entry]) for entry in entries}
    except Exception:  # noqa: BLE001 - whatever it raises
        return "error"
    return "dense" if False in answers else "quantized"


@settings(max_examples=1000, deadline=None)
@given(path=PATHS, entries=st.lists(ENTRIES, max_size=4))
@example(path="model.layers.0.mlp.gate", entries=["gate"])
@example(path="modelXlayers", entries=["model.layers"])
@example(path="model.layers.0", entries=[])
@example(path="model", entries=[")(()"])
def test_our_reading_of_transformers_is_that_of_its_own_function(path, entries):
    ours = TransformersReader().decides("fp8", {"modules_to_not_convert": entries}, path)
    if ours is not None:  # an expression whose time is not bounded is not tried out
        assert ours == convert(path, entries)


def test_few_expressions_of_the_kind_that_files_have_go_unanswered():
    for entry in ("lm_head", "model.layers.3.", "re:.*lm_head", r".*\.mlp\..*", "visual", "(?:a|b).c", "layers.*"):
        assert TransformersReader().decides("fp8", {"modules_to_not_convert": [entry]}, PATH) is not None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@pytest.mark.parametrize("method", ["", "never-heard-of", "gguf", "torchao", "quanto"])
def test_a_method_that_is_not_known_is_not_read(reader, method):
    assert reader.decides(method, {"modules_to_not_convert": ["x"]}, PATH) is None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
@pytest.mark.parametrize(
    ("method", "section"),
    [
        ("fp8", {"modules_to_not_convert": "lm_head"}),
        ("fp8", {"ignored_layers": [3]}),
        ("awq", {"modules_to_not_convert": {}}),
        ("fbgemm_fp8", {"modules_to_not_convert": 3}),
        ("compressed-tensors", {"ignore": [], "config_groups": []}),
        ("compressed-tensors", {"ignore": [], "config_groups": {"g": 3}}),
        ("compressed-tensors", {"ignore": 3, "config_groups": {"g": {"targets": ["Linear"]}}}),
        ("modelopt", {"quantization": {"quant_algo": "MIXED_PRECISION"}}),
        ("modelopt", {"ignore": 3}),
        ("quark", {"exclude": 3}),
        ("gptq", {"dynamic": []}),
        ("gptq", {"modules_in_block_to_quantize": [3]}),
        ("auto-round", {"extra_config": []}),
        ("bitsandbytes", {"llm_int8_skip_modules": 3}),
        ("w8a8_int8", {"ignore": 3}),
        ("mxfp4", {"ignored_layers": 3}),
    ],
)
def test_a_section_that_engines_would_stumble_over_is_not_read(reader, method, section):
    assert reader.decides(method, section, PATH) is None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_hostile_expressions_are_never_run(reader):
    hostile = "(a+)+$"
    started = time.thread_time()
    for method, section in (
        ("fp8", {"modules_to_not_convert": [hostile]}),
        ("compressed-tensors", {"ignore": [f"re:{hostile}"], "config_groups": {"g": {"targets": ["Linear"]}}}),
        ("modelopt", {"ignore": [hostile]}),
        ("quark", {"exclude": [f"re:{hostile}"]}),
        ("gptq", {"dynamic": {f"-:{hostile}": {}}}),
        ("auto-round", {"extra_config": {hostile: {"bits": 16}}}),
    ):
        assert reader.decides(method, section, "a" * 300 + "b") in (None, "quantized")
    assert time.thread_time() - started < 2


def test_a_malformed_expression_stops_the_engine():
    ignored = {"ignore": ["re:(a"], "config_groups": {"g": {"targets": ["Linear"]}}}
    assert {reader.decides("compressed-tensors", ignored, PATH) for reader in READERS} == {"error"}


@pytest.mark.parametrize(
    ("targets", "answers"),
    [
        (["Linear"], ("quantized", "quantized", "quantized")),
        (["re:.*q_proj$"], ("quantized", "quantized", "quantized")),
        (["re:.*up_proj$"], ("dense", "dense", "error")),
        (["Conv2d"], ("dense", "dense", "error")),
    ],
)
def test_a_layer_that_is_no_target_of_any_group(targets, answers):
    section = {"config_groups": {"g": {"targets": targets}}}
    found = [reader.decides("compressed-tensors", section, FUSED if reader.fuses else PATH) for reader in READERS]
    assert found == [answers[0] if reader == READERS[0] else answers[n] for n, reader in enumerate(READERS)]


def test_the_same_auto_round_file_gives_two_answers():
    """One engine searches for an expression, the other wants it to cover the whole name."""
    section = {"extra_config": {r"mlp\.gate": {"bits": 16}, "model.layers.0.self_attn.o_proj": {"bits": 16}}}
    answers = [reader.decides("auto-round", section, "model.layers.0.mlp.gate") for reader in READERS]
    assert answers == [None, "dense", "quantized"]
    assert VLLMReader().decides("auto-round", section, "model.layers.0.self_attn.o_proj") == "dense"
    parts = {"extra_config": {PATH: {"bits": 16}}}
    assert VLLMReader().decides("auto-round", parts, FUSED) is None, "what becomes of shards that differ is not known"


def test_lists_that_an_engine_derives_from_the_tensors_say_nothing():
    assert VLLMReader().decides("awq", {"bits": 4}, PATH) is None
    assert VLLMReader().decides("gptq", {"bits": 4}, PATH) is None
    assert SGLangReader().decides("gptq", {"bits": 4}, PATH) == "quantized"
    assert SGLangReader().decides("gptq", {"modules_in_block_to_quantize": [["q_proj"]]}, PATH) is None


def test_sglang_takes_fp8_lists_with_and_without_the_root():
    for entry, path in (("model.visual", "visual.blocks.0"), ("visual", "model.visual.blocks.0")):
        assert SGLangReader().decides("fp8", {"ignored_layers": [entry]}, path) == "dense"
    assert SGLangReader().decides("w8a8_int8", {"ignore": ["q_proj"]}, PATH) == "dense"


def test_vision_towers_of_modelopt_files_are_never_quantized_by_vllm():
    assert VLLMReader().decides("modelopt", {"ignore": ["lm_head"]}, "model.vision_tower.x") == "dense"
    assert VLLMReader().decides("modelopt_fp4", {"ignore": ["x"]}, "model.layers.0.y") == "quantized"


def test_the_plugin_brings_all_three_with_their_releases():
    found = build_registry({"peers": plugin})
    assert found.failures == ()
    assert {(p.item.name, p.item.version, p.item.fuses) for p in found.peers.values()} == {
        ("transformers", "5.23", False),
        ("vllm", "0.33.0", True),
        ("sglang", "0.5.23", True),
    }
