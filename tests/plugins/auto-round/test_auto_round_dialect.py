"""
auto-round configurations in GPTQ form: each field's values and errors, and rules in their order.
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


REFUSED = {
    "AWQ's layout": ({"packing_format": "auto_round:auto_awq"}, "QP-CFG-REFUSED", "'auto_round:auto_awq' means AWQ's"),
    "compressed-tensors": ({"packing_format": "auto_round:llm_compressor"}, "QP-CFG-REFUSED", "compressed-tensors"),
    "FP8": ({"packing_format": "auto_round:fp8_static"}, "QP-CFG-REFUSED", "FP8 weights and activations"),
    "MXFP": ({"packing_format": "auto_round:mx_fp"}, "QP-CFG-REFUSED", "MXFP"),
    "packing unknown": ({"packing_format": "auto_round:new"}, "QP-CFG-UNKNOWN", "is not a known layout"),
    "packing a number": ({"packing_format": 1}, "QP-CFG-FIELD", "packing_format is the integer 1"),
    "floating-point weights": ({"data_type": "mx_fp"}, "QP-CFG-REFUSED", "data_type is the string 'mx_fp'"),
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
        {"extra_config": {"a.b": {"bits": 8, "data_type": "fp"}}}, "QP-CFG-REFUSED", r"\['a.b'\].data_type",
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
