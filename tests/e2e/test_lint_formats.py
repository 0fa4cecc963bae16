"""
What `lint` finds in checkpoints of real formats, by the installed plugins: signs, factors, powers of two, engines.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import quantplug

N, K = 32, 64
UP = "model.layers.3.mlp.up_proj"
MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head"]}


def fp8_layer(**changes):
    stored = {"weight": torch.full((N, K), 1.0).to(torch.float8_e4m3fn), "weight_scale": torch.full((N,), 0.01)}
    return stored | changes


def nvfp4_layer(**changes):
    stored = {
        "weight": torch.full((N, K // 2), 0x21, dtype=torch.uint8),
        "weight_scale": torch.full((N, K // 16), 2.0).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.001),
        "input_scale": torch.tensor(0.5),
    }
    return stored | changes


def mxfp8_layer(**changes):
    stored = {
        "weight": torch.full((N, K), 1.0).to(torch.float8_e4m3fn),
        "weight_scale": torch.full((N, K // 32), 120, dtype=torch.uint8),
    }
    return stored | changes


def write(directory, layers, section, dense=("lm_head",)):
    tensors = {f"{path}.{name}": tensor.clone() for path, stored in layers.items() for name, tensor in stored.items()}
    tensors |= {f"{path}.weight": torch.ones(8, 8, dtype=torch.bfloat16) for path in ("model.embed_tokens", *dense)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False, "quantization_config": section}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def found(directory, **arguments):
    return [
        (finding.code, finding.severity, finding.where, finding.what)
        for finding in quantplug.lint(directory, **arguments).findings
    ]


CHANNEL = {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
NVFP4 = {**MODELOPT, "quant_algo": "NVFP4"}
MXFP8 = {**MODELOPT, "quant_algo": "MXFP8"}


@pytest.mark.parametrize(("layer", "section"), [(fp8_layer(), CHANNEL), (nvfp4_layer(), NVFP4), (mxfp8_layer(), MXFP8)])
def test_good_layers_give_nothing_to_say(tmp_path, layer, section):
    report = quantplug.lint(write(tmp_path, {UP: layer}, section), deep=True)
    assert report.findings == ()
    assert {name for name, _ in report.peers} == {"vllm", "sglang"}


@pytest.mark.parametrize(
    ("layer", "section", "suffix", "code", "severity", "text"),
    [
        (
            fp8_layer(weight_scale=torch.full((N,), -3.4e38)),
            CHANNEL, "weight_scale", "QP-ST-SCALE", "error", "32 of 32 scale(s) (the first is number 0) are negative",
        ),
        (
            fp8_layer(weight_scale=torch.full((N,), 200.0)),
            CHANNEL, "weight_scale", "QP-LINT-HUGE", "warning", "makes weights of up to 8.96e+04",
        ),
        (
            nvfp4_layer(input_scale=torch.tensor(0.0)),
            NVFP4, "input_scale", "QP-ST-SCALE", "error", "are 0, where x or a scale is divided by them",
        ),
        (
            nvfp4_layer(weight_scale_2=torch.tensor(6000.0)),
            NVFP4, "weight_scale", "QP-LINT-HUGE", "warning", "makes weights of up to 7.2e+04",
        ),
        (
            nvfp4_layer(weight_scale=torch.full((N, K // 16), -2.0).to(torch.float8_e4m3fn)),
            NVFP4, "weight_scale", "QP-ST-SCALE", "error", "are negative",
        ),
        (
            mxfp8_layer(weight_scale=torch.full((N, K // 32), 255, dtype=torch.uint8)),
            MXFP8, "weight_scale", "QP-ST-SCALE", "error", "64 of 64 scale(s) (the first is number 0) are NaN",
        ),
        (
            mxfp8_layer(weight_scale=torch.full((N, K // 32), 140, dtype=torch.uint8)),
            MXFP8, "weight_scale", "QP-LINT-HUGE", "warning", "makes weights of up to 3.67e+06",
        ),
    ],
)  # fmt: skip
def test_bad_scales_are_found_by_the_rules_of_their_format(tmp_path, layer, section, suffix, code, severity, text):
    findings = found(write(tmp_path, {UP: layer}, section))
    assert (code, severity, f"{UP}.{suffix}") in [finding[:3] for finding in findings], findings
    assert any(text in finding[3] for finding in findings), findings


def test_a_stored_reciprocal_is_read_as_one(tmp_path):
    """In this spelling a small number means large weights."""
    stored = nvfp4_layer()
    layer = {
        "weight_packed": stored["weight"],
        "weight_scale": stored["weight_scale"],
        "weight_global_scale": torch.tensor([1000.0]),
    }
    group = {
        "targets": ["Linear"],
        "format": "nvfp4-pack-quantized",
        "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
            "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
        },
    }  # fmt: skip
    section = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    assert found(write(tmp_path, {UP: layer}, section)) == []
    layer["weight_global_scale"] = torch.tensor([1 / 6000])
    [(code, _, where, what)] = found(write(tmp_path, {UP: layer}, section))
    assert (code, where) == ("QP-LINT-HUGE", f"{UP}.weight_scale")
    assert "makes weights of up to 7.2e+04" in what


@pytest.mark.parametrize(("octet", "dtype"), [(0x7F, torch.float8_e4m3fn), (0xFF, torch.float8_e4m3fn)])
def test_a_deep_look_finds_codes_that_are_not_numbers_and_any_other_does_not(tmp_path, octet, dtype):
    weight = torch.zeros(N, K, dtype=torch.uint8)
    weight[5, 6] = octet
    directory = write(tmp_path, {UP: fp8_layer(weight=weight.view(dtype))}, CHANNEL)
    assert found(directory) == []
    [(code, severity, where, what)] = found(directory, deep=True)
    assert (code, severity, where) == ("QP-LINT-CODE", "error", f"{UP}.weight")
    assert what == f"1 of {N * K:,} codes (the first is number {5 * K + 6}) are NaN or infinite"


@pytest.mark.parametrize("octet", [0x7C, 0x7D, 0xFC, 0xFF])
def test_the_other_8_bit_float_has_infinities_too(tmp_path, octet):
    weight = torch.full((N, K), 0x7B, dtype=torch.uint8)
    weight[0, 0] = octet
    description = {"dtype": "fp8_e5m2", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False}
    section = {"quant_method": "quark", "global_quant_config": {"weight": description}, "exclude": ["lm_head"]}
    layer = fp8_layer(weight=weight.view(torch.float8_e5m2), weight_scale=torch.full((N,), 1e-5))
    report = quantplug.lint(write(tmp_path, {UP: layer}, section), deep=True)
    assert [finding.code for finding in report.findings] == ["QP-LINT-CODE"]
    assert report.codes == 1


def test_the_trailing_dot_that_started_it_all(tmp_path):
    """
    `model.layers.34.` keeps layer 34 whole, and that only. Transformers reads the dot as any character, so that layer
    340 stays whole, too; vLLM wants whole paths and quantizes layer 34; SGLang and we agree.
    """
    layer = {"weight": fp8_layer()["weight"], "weight_scale_inv": torch.full((1, 1), 0.01)}
    layers = {f"model.layers.{number}.mlp.down_proj": layer for number in (3, 340)}
    section = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["model.layers.34.", "lm_head"],
    }  # fmt: skip
    directory = write(tmp_path, layers, section, ("lm_head", "model.layers.34.mlp.down_proj"))
    report = quantplug.lint(directory)
    told = {finding.what: finding.names for finding in report.findings if finding.code == "QP-LINT-PEER"}
    assert told == {
        "transformers 5.23 would leave whole 1 layer(s) that are stored quantized": ("model.layers.340.mlp.down_proj",),
        "vllm 0.33.0 would take for quantized 1 layer(s) that are stored dense": ("model.layers.34.mlp.down_proj",),
    }
    assert [finding.code for finding in report.findings if finding.code != "QP-LINT-PEER"] == ["QP-LINT-READING"]
    assert report.worst == "warning"
