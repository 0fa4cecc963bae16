"""
Files that auto-round wrote, in its own spelling and in that of GPTQ: configurations, bytes, and dequantized weights.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from quantplug.config import resolve_config
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import registry

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"I32": torch.int32, "F16": torch.float16}
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def read(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def tensor(spelled: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=DTYPES[spelled["dtype"]]).view(spelled["shape"])


def resolved(document: dict, directory: Path):
    """Resolve as a checkpoint directory is: config.json, and auto-round's own file beside it."""
    config = {"model_type": "llama", "quantization_config": document["config"]["quantization_config"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "quantization_config.json").write_text(json.dumps(document["config"]["quantization_config.json"]))
    return resolve_config(directory, registry())


def test_the_cases_are_all_there():
    """Three packing formats, every width, both symmetries, layers of their own, and files in GPTQ's spelling."""
    assert len(CASES) == 11


@pytest.mark.parametrize("case", CASES)
def test_decode_agrees_with_auto_round_bit_for_bit_and_encode_gives_its_bytes(case, tmp_path):
    """Its symmetric files have negative scales, its zero points three ways of being stored."""
    document = read(case)
    config = resolved(document, tmp_path)
    assert config.dialect == ("gptq" if case.startswith("ar-gptq") else "auto-round")
    matcher = Matcher(config.rules, config.default)
    for path, layer in document["layers"].items():
        tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
        use = matcher.decide(ModuleInfo(path, "linear")).use
        scheme = registry().schemes[use.name].item.build(dict(use.params), case)
        shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, path)
        weight = scheme.decode(tensors, shape, path)
        assert torch.equal(weight.dequantize(torch.float16), tensor(layer["dequantized"])), path
        encoded = scheme.encode(weight)
        assert encoded.keys() - tensors.keys() <= {"g_idx"}
        assert all(torch.equal(encoded[suffix], stored) for suffix, stored in tensors.items()), path


@pytest.mark.parametrize("case", CASES)
def test_the_rules_say_of_every_linear_layer_what_is_stored(case, tmp_path):
    """Layers outside the named blocks and layers of 16 bits are whole, all others quantized; no entry is idle."""
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


def test_some_symmetric_files_do_have_negative_scales():
    """So a check for positive scales would refuse real files."""
    scales = tensor(read("ar-w4g64-sym")["layers"]["model.layers.0.self_attn.k_proj"]["tensors"]["scales"])
    assert (scales < 0).any()
