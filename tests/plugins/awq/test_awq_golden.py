"""
Files that GPTQModel wrote: its own configurations, its own bytes, its own dequantized weights.
"""

from __future__ import annotations

import json

import pytest
import torch
from awq_files import GOLDEN, build, read, tensor

from quantplug.config import resolve_config
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import registry
from quantplug_awq.scheme import AWQScheme

CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
CHECKPOINTS = [case for case in CASES if case.startswith("gemm")]


def resolved(document: dict, directory):
    """Resolve as a checkpoint directory is: config.json, and the file that GPTQModel puts beside it."""
    config = {"model_type": "llama", "quantization_config": document["config"]["quantization_config"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "quantize_config.json").write_text(json.dumps(document["config"]["quantize_config.json"]))
    return resolve_config(directory, registry())


def agrees(scheme: AWQScheme, layer: dict, path: str) -> None:
    """Check the values of one layer against the maker's, and its bytes after the way back."""
    tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
    shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, path)
    weight = scheme.decode(tensors, shape, path)
    assert torch.equal(weight.dequantize(torch.float16), tensor(layer["dequantized"])), path
    encoded = scheme.encode(weight)
    assert encoded.keys() == tensors.keys()
    for suffix, stored in tensors.items():
        assert encoded[suffix].dtype == stored.dtype
        assert torch.equal(encoded[suffix], stored), (path, suffix)


def test_the_cases_are_all_there():
    """Both symmetries, one group, a layer left whole by an expression; GEMV's layout for two groups."""
    assert len(CASES) == 6


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_decode_agrees_with_gptqmodel_bit_for_bit_and_encode_gives_its_bytes(case, tmp_path):
    """From its configuration through the rules to the scheme, then to values and back to bytes."""
    document = read(case)
    config = resolved(document, tmp_path)
    assert config.dialect == "awq"
    matcher = Matcher(config.rules, config.default)
    for path, layer in document["layers"].items():
        use = matcher.decide(ModuleInfo(path, "linear")).use
        agrees(AWQScheme.build(dict(use.params), case), layer, path)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(CHECKPOINTS)))
def test_gemvs_layout_as_gptqmodel_packs_it(case):
    """Codes, zero points and scales were chosen; they and their products come back."""
    document = read(case)
    agrees(build(**document["arguments"]), document["layers"]["layer"], case)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_rules_say_of_every_linear_layer_what_is_stored(case, tmp_path):
    """Quantized layers quantized, whole layers whole; no entry is idle and no key unknown."""
    document = read(case)
    config = resolved(document, tmp_path)
    matcher = Matcher(config.rules, config.default)
    modules: dict[str, set[str]] = {}
    for name in document["stored"]:
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, set()).add(suffix)
    for path, suffixes in modules.items():
        if not path.endswith(("norm", "layernorm", "embed_tokens")):
            assert (matcher.decide(ModuleInfo(path, "linear")).use is not None) == ("qweight" in suffixes), path
    assert not matcher.report().unused
    assert not [note for note in config.notes if "not known" in note]


def test_scales_are_stored_as_the_model_is():
    """GPTQModel keeps bfloat16 where other writers have float16; the canonical form keeps what is there."""
    layer = read("gemm-w4g64-asym")["layers"]["model.layers.0.mlp.down_proj"]["tensors"]
    assert layer["scales"]["dtype"] == "BF16"
    tensors = {suffix: tensor(spelled) for suffix, spelled in layer.items()}
    scheme = build(group_size=64)
    weight = scheme.decode(tensors, scheme.shape_of({s: tuple(t.shape) for s, t in tensors.items()}, "layer"), "layer")
    assert weight.spec.scale_dtype == "bfloat16"
