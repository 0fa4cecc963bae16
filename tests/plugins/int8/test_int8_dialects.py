"""
Configurations of plain INT8 files, and those of bitsandbytes, which are refused with what to do instead.
"""

from __future__ import annotations

import json

import pytest
import torch
from int8_files import build
from safetensors.torch import save_file

from quantplug.config import RawConfig, resolve_config
from quantplug.errors import CheckpointError, ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.load import load_layers
from quantplug.matcher import Matcher
from quantplug.planner import plan
from quantplug.plugins import registry
from quantplug_int8.bitsandbytes import BitsAndBytesDialect
from quantplug_int8.dialect import PlainInt8Dialect
from quantplug_int8.scheme import Int8Scheme

WHERE = "config.json: quantization_config"
BLOCK = {"weight_block_size": [128, 128]}


def raw(method: str, fields: dict) -> RawConfig:
    fields = {"quant_method": method, **fields}
    return RawConfig(method, fields, {key: f"{WHERE}.{key}" for key in fields}, {}, WHERE)


def parse(method: str, **fields: object):
    return PlainInt8Dialect().parse(raw(method, fields))


def ruling(config, path: str) -> Int8Scheme | None:
    use = Matcher(config.rules, config.default).decide(ModuleInfo(path, "linear")).use
    return None if use is None else build(**dict(use.params))


def test_w8a8_int8_is_per_channel_with_x_per_token():
    config = parse("w8a8_int8", activation_scheme="dynamic", is_dynamic=True)
    expected = build(activation="int8/token/dynamic")
    assert ruling(config, "model.layers.0.mlp.up_proj") == expected
    assert ruling(config, "lm_head") is None
    assert config.notes == ()
    assert {field.name for field in config.fields} == {"quant_method", "activation_scheme", "is_dynamic"}


def test_blockwise_int8_has_blocks_under_another_name():
    """And x is quantized in groups as wide as a block."""
    config = parse("blockwise_int8", weight_block_size=[64, 32], activation_scheme="dynamic")
    assert ruling(config, "model.layers.0.mlp.up_proj") == build(
        strategy="block", block_n=64, block_k=32, scale_name="weight_scale_inv", activation="int8/group32/dynamic"
    )
    assert ruling(config, "lm_head") is None


@pytest.mark.parametrize(
    ("method", "fields", "path", "kept"),
    [
        ("w8a8_int8", {"ignore": ["model.layers.0.mlp.up_proj"]}, "model.layers.0.mlp.up_proj", True),
        ("w8a8_int8", {"ignore": ["model.layers.0.mlp"]}, "model.layers.0.mlp.up_proj", False),
        ("w8a8_int8", {"ignore": ["re:.*up_proj"]}, "model.layers.3.mlp.up_proj", True),
        ("blockwise_int8", {**BLOCK, "ignored_layers": ["model.layers.0."]}, "model.layers.0.mlp.up_proj", True),
        ("blockwise_int8", {**BLOCK, "modules_to_not_convert": ["mlp"]}, "model.layers.0.mlp.up_proj", True),
        ("blockwise_int8", {**BLOCK, "modules_to_not_convert": ["mlp.gate"]}, "model.layers.0.mlp.gate_proj", False),
        ("blockwise_int8", {**BLOCK, "ignored_layers": None}, "model.layers.0.mlp.up_proj", False),
    ],
)
def test_layers_left_whole(method, fields, path, kept):
    assert (ruling(parse(method, **fields), path) is None) == kept


REFUSED = {
    "no block size": ("blockwise_int8", {}, "QP-CFG-FIELD", "weight_block_size is absent.*is missing"),
    "a block of one number": ("blockwise_int8", {"weight_block_size": [128]}, "QP-CFG-FIELD", "a list of 1"),
    "a block of none": ("blockwise_int8", {"weight_block_size": [0, 128]}, "QP-CFG-FIELD", "two integers above 0"),
    "a block of true": ("blockwise_int8", {"weight_block_size": [True, 128]}, "QP-CFG-FIELD", "two integers"),
    "a block of text": ("blockwise_int8", {"weight_block_size": "128"}, "QP-CFG-FIELD", "the string '128'"),
    "stored scales of x": ("w8a8_int8", {"activation_scheme": "static"}, "QP-CFG-REFUSED", "no layout for stored"),
    "another scheme": ("w8a8_int8", {"activation_scheme": "token"}, "QP-CFG-FIELD", "'dynamic', 'static'"),
    "dynamic by text": ("w8a8_int8", {"is_dynamic": "yes"}, "QP-CFG-FIELD", "the string 'yes'"),
    "a list that is none": ("w8a8_int8", {"ignore": "lm_head"}, "QP-CFG-FIELD", "a list of texts"),
    "an empty entry": ("w8a8_int8", {"ignore": [""]}, "QP-SKIP-PATTERN", "cover every module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    method, fields, code, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as caught:
        parse(method, **fields)
    assert caught.value.code == code


def test_unknown_keys_are_noted():
    assert parse("w8a8_int8", colour="blue").notes == (
        f"{WHERE}.colour is not known to this reader and left out of account",
    )


BNB = {
    "eight bits": ({"load_in_8bit": True}, "QP-CFG-REFUSED", "load_in_8bit: LLM.int8.*threshold.*quantize=\"int8\""),
    "eight bits as saved": ({"_load_in_8bit": True}, "QP-CFG-REFUSED", "_load_in_8bit: LLM.int8"),
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "QP-CFG-REFUSED", "of type 'nf4'.*a table of their"),
    "fp4, the default": ({"load_in_4bit": True}, "QP-CFG-REFUSED", "of type 'fp4'.*quantize=\"mxfp4\""),
    "nested scales": (
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "QP-CFG-REFUSED", "nested_absmax",
    ),
    "neither": ({}, "QP-CFG-REFUSED", "neither load_in_8bit nor load_in_4bit"),
    "both": ({"load_in_8bit": True, "load_in_4bit": True}, "QP-CFG-CONTRADICTION", "one of the two"),
    "a number": ({"load_in_4bit": 1}, "QP-CFG-FIELD", "the integer 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BNB)
def test_bitsandbytes_is_refused_with_the_reason_and_the_way_out(name):
    """A dense file that only asks to be quantized has the same words, so every refusal says what to do with one."""
    fields, code, text = BNB[name]
    with pytest.raises(ConfigError, match=text) as caught:
        BitsAndBytesDialect().parse(raw("bitsandbytes", fields))
    assert caught.value.code == code
    if code == "QP-CFG-REFUSED":
        assert "If the tensors are dense" in caught.value.fix


@pytest.mark.parametrize("method", ["bitsandbytes", "w8a8_int8", "blockwise_int8"])
def test_the_installed_plugin_answers_to_its_methods(method, tmp_path):
    section = {"quant_method": method, "load_in_8bit": True, **BLOCK}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    if method == "bitsandbytes":
        with pytest.raises(ConfigError, match=r"LLM\.int8"):
            resolve_config(tmp_path, registry())
    else:
        assert resolve_config(tmp_path, registry()).dialect == "int8"


UP, HEAD = "model.layers.0.mlp.up_proj", "lm_head"


def checkpoint(directory, **changes: torch.Tensor | None):
    """Write a checkpoint of one quantized layer, as SGLang serves it, and a dense head."""
    scheme = build(activation="int8/token/dynamic")
    dense = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    stored = scheme.encode(scheme.quantize(dense))
    tensors = {f"{UP}.{suffix}": tensor for suffix, tensor in stored.items()}
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].float()
    tensors |= {"model.embed_tokens.weight": torch.ones(40, 32).half(), f"{HEAD}.weight": torch.ones(40, 32).half()}
    tensors |= {f"{UP}.{suffix}": tensor for suffix, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": {"quant_method": "w8a8_int8"}}
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("shape", [(24, 1), (24,)])
def test_a_checkpoint_from_headers_to_values(shape, tmp_path):
    """Planned, loaded and dequantized; scales may be stored as `[N]`, too."""
    tensors = checkpoint(tmp_path)
    tensors = checkpoint(tmp_path, weight_scale=tensors[f"{UP}.weight_scale"].reshape(shape))
    planned = plan(tmp_path, platform="cpu")
    layer = planned.layer(UP)
    assert layer.scheme == "int8 per channel sym, x int8 per token, dynamic"
    assert layer.problem.activation.describe() == "int8 per token, dynamic"
    assert not planned.layer(HEAD).quantized
    loaded = load_layers(planned, tmp_path)
    expected = tensors[f"{UP}.weight"].float() * tensors[f"{UP}.weight_scale"].reshape(24, 1)
    assert torch.equal(loaded.modules[UP].dequantize(), expected)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"weight_scale": None}, "QP-ST-MISSING"),
        ({"weight_scale": torch.ones(1, 24)}, "QP-ST-SHAPE"),
        ({"weight_scale": torch.ones(24, 1).double()}, "QP-ST-DTYPE"),
        ({"weight_zero_point": torch.zeros(24, 1).char()}, "QP-ST-EXTRA"),
    ],
)
def test_a_checkpoint_that_does_not_fit_stops_at_the_plan(change, code, tmp_path):
    """Before anything is read; zero points that nothing announces are not ignored."""
    checkpoint(tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        plan(tmp_path, platform="cpu")
    assert caught.value.code == code
