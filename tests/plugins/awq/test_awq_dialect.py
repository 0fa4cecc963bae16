"""
Configurations as AutoAWQ, auto-round, GPTQModel and engines spell them: each field's values and errors, and the rules.
"""

from __future__ import annotations

import json

import pytest
import torch
from awq_files import build, stored_layer
from safetensors.torch import save_file

from quantplug.config import RawConfig, resolve_config
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.load import load_layers
from quantplug.matcher import Matcher
from quantplug.planner import plan
from quantplug.plugins import registry
from quantplug_awq.dialect import AWQDialect
from quantplug_awq.scheme import AWQScheme

GOOD = {"quant_method": "awq", "bits": 4, "group_size": 64}
WHERE = "config.json: quantization_config"
UP = "model.layers.0.mlp.up_proj"


def parse(drop: tuple[str, ...] = (), **fields: object):
    fields = {key: value for key, value in {**GOOD, **fields}.items() if key not in drop}
    return AWQDialect().parse(RawConfig("awq", fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE))


def ruling(config, path: str) -> AWQScheme | None:
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    return None if use is None else build(**dict(use.params))


BASE = build(group_size=64)
ACCEPTED = {
    "the least": ({}, BASE),
    "AutoAWQ in config.json": ({"version": "gemm", "zero_point": True, "modules_to_not_convert": None}, BASE),
    "an older engine's case": ({"version": "GEMM"}, BASE),
    "GEMV": ({"version": "gemv"}, build(group_size=64, version="gemv")),
    "a kernel's name": ({"version": "exllama", "exllama_config": {"version": 2}}, BASE),
    "without zero points": ({"zero_point": False}, build(group_size=64, zero_point=False)),
    "symmetric": ({"sym": True}, build(group_size=64, zero_point=False)),
    "both, as they are": ({"sym": True, "zero_point": True}, BASE),
    "one group": ({"group_size": -1}, build(group_size=-1)),
    "auto-round": (
        {"provider": "auto-round", "autoround_version": "0.16.1", "sym": False, "zero_point": True, "data_type": "int",
         "enable_quanted_input": False, "version": "gemm"}, BASE,
    ),
    "GPTQModel": (
        {"method": "awq", "format": "gemm", "checkpoint_format": "gemm", "version": "gemm", "pack_dtype": "int32",
         "desc_act": False, "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}, BASE,
    ),
    "both names of a number": ({"w_bit": 4, "q_group_size": 64}, BASE),
    "a loader's wishes": ({"do_fuse": False, "fuse_max_seq_len": 512, "backend": "autoawq"}, BASE),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted(name):
    """Fields as writers write them, and the parameters they mean; every key is listed and none is remarked upon."""
    fields, scheme = ACCEPTED[name]
    config = parse(**fields)
    assert ruling(config, UP) == scheme
    assert {field.name for field in config.fields} >= {*GOOD, *fields, "bits", "group_size", "lm_head"}
    assert config.notes == ()


def test_defaults_are_listed_as_such():
    fields = {field.name: (field.value, field.origin) for field in parse().fields}
    assert fields["version"] == ("gemm", "default (version is absent)")
    assert fields["zero_point"] == (True, "default (zero_point is absent)")
    assert fields["lm_head"] == (False, "default (lm_head is absent)")
    assert "zero_point" not in {field.name for field in parse(sym=True).fields}


REFUSED = {
    "no bits": ({}, ("bits",), "QP-CFG-FIELD", "bits is missing"),
    "no group": ({}, ("group_size",), "QP-CFG-FIELD", "group_size is missing"),
    "another width": ({"bits": 8}, (), "QP-CFG-REFUSED", "two different orders.*GPTQ has 2, 3 and 8"),
    "two widths": ({"w_bit": 3}, (), "QP-CFG-REFUSED", "w_bit is 3"),
    "two groups": (
        {"q_group_size": 128}, (), "QP-CFG-CONTRADICTION",
        "q_group_size: is the integer 128, while .*group_size is the integer 64",
    ),
    "two layouts": ({"version": "gemm", "format": "gemv"}, (), "QP-CFG-CONTRADICTION", "'gemv'.*while .*'gemm'"),
    "marlin": ({"version": "marlin"}, (), "QP-CFG-REFUSED", "one GPU kernel"),
    "gemv_fast": ({"version": "gemv_fast"}, (), "QP-CFG-REFUSED", "multiplied by their scales and rounded"),
    "llm-awq": ({"backend": "llm-awq"}, (), "QP-CFG-REFUSED", "backend: the layout 'llm-awq' is not read"),
    "another layout": ({"version": "gptq"}, (), "QP-CFG-UNKNOWN", "'gptq' is not a known layout"),
    "another method": ({"method": "gptq"}, (), "QP-CFG-CONTRADICTION", "while quant_method is 'awq'"),
    "zero_point a text": ({"zero_point": "true"}, (), "QP-CFG-FIELD", "the string 'true'"),
    "sym a number": ({"sym": 1}, (), "QP-CFG-FIELD", "sym is the integer 1"),
    "16-bit words": ({"pack_dtype": "int16"}, (), "QP-CFG-UNKNOWN", "pack_dtype is the string 'int16'"),
    "quantized activations": ({"act_bits": 8}, (), "QP-CFG-UNKNOWN", "act_bits is the integer 8"),
    "act-order": ({"desc_act": True}, (), "QP-CFG-UNKNOWN", "desc_act is true"),
    "layers of their own": ({"extra_config": {"a": {"bits": 8}}}, (), "QP-CFG-UNKNOWN", "extra_config"),
    "a list that is none": ({"modules_to_not_convert": "lm_head"}, (), "QP-CFG-FIELD", "a list of texts"),
    "an empty entry": ({"modules_to_not_convert": [""]}, (), "QP-SKIP-PATTERN", "cover every module"),
    "rules that are none": ({"dynamic": {"-:a": None}}, (), "QP-CFG-FIELD", r"dynamic\[0\]: is null"),
    "a rule with another layout": (
        {"dynamic": {"+:a": {"version": "gemv"}}}, (), "QP-CFG-UNKNOWN", "one module cannot choose",
    ),
    "a rule with another width": ({"dynamic": {"+:a": {"bits": 8}}}, (), "QP-CFG-REFUSED", r"dynamic\[0\].bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    fields, drop, code, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as caught:
        parse(drop, **fields)
    assert caught.value.code == code


def test_unknown_keys_are_noted():
    assert parse(colour="blue").notes == (f"{WHERE}.colour is not known to this reader and left out of account",)


SKIPS = [
    (["lm_head"], "lm_head", True),
    (["model.layers.0.mlp.up_proj"], UP, True),
    (["mlp"], UP, True),
    (["visual"], "visual.blocks.3.mlp.fc1", True),
    (["mlp.gate"], "model.layers.0.mlp.gate", True),
    (["mlp.gate"], "model.layers.0.mlp.gate_proj", False),
    (["mlp.gate"], "model.layers.0.mlp.gate_up_proj", False),
    (["layers.1"], "model.layers.10.mlp.up_proj", False),
    (["gate"], "model.layers.0.mlp.shared_expert_gate", False),
]


@pytest.mark.parametrize(("entries", "path", "kept"), SKIPS)
def test_entries_cover_whole_components(entries, path, kept):
    """AutoAWQ and engines take an entry as any part of a name; what that covers beyond this, the tensors decide."""
    assert (ruling(parse(modules_to_not_convert=entries), path) is None) == kept


def test_the_head_stays_whole_unless_the_file_says_otherwise():
    assert ruling(parse(), "lm_head") is None
    assert ruling(parse(), "model.lm_head") is None
    assert ruling(parse(lm_head=True), "lm_head") == BASE


@pytest.mark.parametrize("spelled", ["model.layers", ["model.layers"], [["model.layers"]]])
def test_nothing_outside_the_named_blocks_is_quantized(spelled):
    config = parse(to_quant_block_names=spelled)
    assert ruling(config, UP) == BASE
    assert ruling(config, "vision.blocks.0.mlp.up_proj") is None
    assert ruling(config, "lm_head") is None


def test_rules_by_expression():
    """GPTQModel's `dynamic`, in its order; keys that only say how a module was quantized do not count."""
    config = parse(
        dynamic={r"-:.*\.k_proj": {}, r"+:.*\.q_proj": {"group_size": 32, "sym": True, "mse": 2.4}, r".*\.v_proj": {}}
    )
    assert ruling(config, "model.layers.0.self_attn.k_proj") is None
    assert ruling(config, "model.layers.0.self_attn.q_proj") == build(group_size=32, zero_point=False)
    assert ruling(config, "model.layers.0.self_attn.v_proj") == BASE
    assert ruling(config, UP) == BASE


OWN = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None}


def write(directory, **files: dict) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_autoawqs_own_file_alone(tmp_path):
    """Its first versions wrote no other."""
    write(tmp_path, config={"model_type": "llama"}, quant_config=OWN)
    config = resolve_config(tmp_path, registry())
    assert config.dialect == "awq"
    assert ruling(config, UP) == BASE
    assert ruling(config, "lm_head") is None


def test_autoawqs_own_file_beside_config_json(tmp_path):
    """Other names, and another case, for the same things."""
    section = {**GOOD, "version": "gemm", "zero_point": True}
    write(tmp_path, config={"model_type": "llama", "quantization_config": section}, quant_config=OWN)
    assert ruling(resolve_config(tmp_path, registry()), UP) == BASE
    write(tmp_path, quant_config={**OWN, "q_group_size": 128})
    with pytest.raises(ConfigError, match=r"quant_config\.json: q_group_size: is the integer 128") as caught:
        resolve_config(tmp_path, registry())
    assert caught.value.code == "QP-CFG-CONTRADICTION"


@pytest.mark.parametrize("method", ["awq", "AWQ", "auto_awq", "awq_marlin"])
def test_the_methods_it_answers_to(method, tmp_path):
    write(tmp_path, config={"model_type": "llama", "quantization_config": {**GOOD, "quant_method": method}})
    assert resolve_config(tmp_path, registry()).dialect == "awq"


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_a_checkpoint_from_headers_to_values(version, tmp_path):
    """Planned, loaded and dequantized, a head beside it left whole."""
    layer = stored_layer(build(group_size=64, version=version), 24, 128, seed=8)
    tensors = {f"{UP}.{suffix}": tensor for suffix, tensor in layer.tensors.items()}
    tensors |= {"model.embed_tokens.weight": torch.ones(40, 128).half(), "lm_head.weight": torch.ones(40, 128).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    section = {**GOOD, "version": version, "modules_to_not_convert": ["lm_head"]}
    write(tmp_path, config={"model_type": "llama", "dtype": "float32", "quantization_config": section})
    planned = plan(tmp_path, platform="cpu")
    assert not planned.layer("lm_head").quantized
    assert planned.warnings == () or all("kernel" in warning for warning in planned.warnings)
    loaded = load_layers(planned, tmp_path)
    assert torch.equal(loaded.modules[UP].dequantize().double(), torch.from_numpy(layer.values()).float().double())
