"""
Files that auto-round wrote, in its own spelling and in those of GPTQ and AWQ: configurations, bytes, values.
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
DTYPES = {
    "I32": torch.int32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
QUANTIZED = {"qweight", "weight_packed", "weight_scale", "weight_scale_inv"}


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


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors are the same bits; single numbers and columns of them may have one axis more or less."""
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8)
    )


def test_the_cases_are_all_there():
    """Four packings of integers, every width, both symmetries, layers of their own; FP8 in three forms, MX, NVFP4."""
    assert len(CASES) == 22


@pytest.mark.parametrize("case", CASES)
def test_decode_agrees_with_auto_round_bit_for_bit_and_encode_gives_its_bytes(case, tmp_path):
    """Its symmetric files have negative scales, its zero points four ways of being stored."""
    document = read(case)
    config = resolved(document, tmp_path)
    assert config.dialect == {"ar-gptq": "gptq", "ar-awq-": "awq"}.get(case[:7], "auto-round")
    matcher = Matcher(config.rules, config.default)
    for path, layer in document["layers"].items():
        tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
        use = matcher.decide(ModuleInfo(path, "linear")).use
        scheme = registry().schemes[use.name].item.build(dict(use.params), case)
        shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, path)
        weight = scheme.decode(tensors, shape, path)
        if layer["dequantized"] is not None:
            expected = tensor(layer["dequantized"])
            if use.name == "nvfp4":
                # auto-round rounds a reciprocal, its product with the code and that with the scale; here two products
                # are rounded. Each time by 2^-24 at most.
                assert torch.allclose(weight.dequantize(), expected, rtol=5 * 2.0**-24, atol=0), path
            else:
                assert torch.equal(weight.dequantize(expected.dtype), expected), path
        encoded = scheme.encode(weight, scheme.decode_activation(tensors, path))
        assert encoded.keys() - tensors.keys() <= {"g_idx"}
        for suffix, stored in tensors.items():
            if suffix != "input_scale":  # whose dtype is the scheme's to choose
                assert same(encoded[suffix], stored), (path, suffix)


@pytest.mark.parametrize("case", CASES)
def test_the_rules_say_of_every_linear_layer_what_is_stored(case, tmp_path):
    """Layers outside the named blocks and layers of 16 bits are whole, all others quantized; no entry is idle."""
    document = read(case)
    config = resolved(document, tmp_path)
    matcher = Matcher(config.rules, config.default)
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in document["stored"].items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = tuple(shape)
    for path, shapes in modules.items():
        if path.endswith(("norm", "layernorm", "embed_tokens")):
            continue
        use = matcher.decide(ModuleInfo(path, "linear")).use
        assert (use is not None) == bool(QUANTIZED & shapes.keys()), path
        if use is not None:
            scheme = registry().schemes[use.name].item.build(dict(use.params), case)
            assert scheme.required_suffixes <= shapes.keys()
            scheme.shape_of(shapes, path)
    assert not matcher.report().unused
    assert not [note for note in config.notes if "not known" in note]


def test_some_symmetric_files_do_have_negative_scales():
    """So a check for positive scales would refuse real files."""
    scales = tensor(read("ar-w4g64-sym")["layers"]["model.layers.0.self_attn.k_proj"]["tensors"]["scales"])
    assert (scales < 0).any()
