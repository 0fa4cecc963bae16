"""
Files that GPTQModel wrote: its own configurations, its own bytes, its own dequantized weights.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from quantplug.config import RawConfig
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.spec import LinearShape
from quantplug_gptq.dialect import GPTQDialect
from quantplug_gptq.scheme import GPTQScheme

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"I32": torch.int32, "F16": torch.float16}
PLANAR = {"w3g64-sym-planar", "w6g64-sym-planar"}
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def read(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def tensor(spelled: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=DTYPES[spelled["dtype"]]).view(spelled["shape"])


def parsed(document: dict, section: str = "quantization_config"):
    fields = document["config"][section]
    return GPTQDialect().parse(RawConfig("gptq", fields, {}, {}, "config.json: quantization_config"))


def stored_shapes(document: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in document["stored"].items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = tuple(shape)
    return modules


def test_the_cases_are_all_there():
    """Every width, both formats, both symmetries, act-order, a ragged group, overrides, a quantized head."""
    assert len(CASES) == 21


@pytest.mark.parametrize("case", sorted(set(CASES) - PLANAR))
def test_decode_agrees_with_gptqmodel_bit_for_bit_and_encode_gives_its_bytes(case):
    """From its configuration through the rules to the scheme, then to values and back to bytes."""
    document = read(case)
    config = parsed(document)
    matcher = Matcher(config.rules, config.default)
    for path, layer in document["layers"].items():
        tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items() if suffix != "bias"}
        use = matcher.decide(ModuleInfo(path, "linear")).use
        scheme = GPTQScheme.build(dict(use.params), case)
        shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, path)
        weight = scheme.decode(tensors, shape, path)
        assert torch.equal(weight.dequantize(torch.float16), tensor(layer["dequantized"])), path
        encoded = scheme.encode(weight)
        assert encoded.keys() == tensors.keys()
        assert all(torch.equal(encoded[suffix], tensors[suffix]) for suffix in tensors), path


@pytest.mark.parametrize("case", sorted(set(CASES) - PLANAR))
def test_the_rules_say_of_every_linear_layer_what_is_stored(case):
    """Quantized layers in the scheme whose shapes they have, whole layers whole."""
    document = read(case)
    config = parsed(document)
    matcher = Matcher(config.rules, config.default)
    for path, shapes in stored_shapes(document).items():
        if path.endswith(("norm", "layernorm", "embed_tokens")):
            continue
        use = matcher.decide(ModuleInfo(path, "linear")).use
        assert (use is not None) == ("qweight" in shapes), path
        if use is not None:
            scheme = GPTQScheme.build(dict(use.params), case)
            shape = scheme.shape_of({suffix: size for suffix, size in shapes.items() if suffix != "bias"}, path)
            assert shape == LinearShape(shapes["scales"][1], shapes["g_idx"][0])
    assert not matcher.report().unused
    assert not config.notes


@pytest.mark.parametrize("case", CASES)
def test_the_file_beside_config_json_says_the_same(case):
    """quantize_config.json parses to the same rules, or is refused alike."""
    document = read(case)
    if case in PLANAR:
        for section in ("quantization_config", "quantize_config.json"):
            with pytest.raises(ConfigError, match=r"gptq_p.*bit planes") as caught:
                parsed(document, section)
            assert caught.value.code == "QP-CFG-REFUSED"
        return
    one, two = parsed(document), parsed(document, "quantize_config.json")
    assert (one.default, one.rules) == (two.default, two.rules)


@pytest.mark.parametrize(("v1", "v2"), [("w4g32-asym-v1", "w4g32-asym-v2"), ("w3g32-asym-v1", "w3g32-asym-v2")])
def test_both_versions_of_the_same_model_decode_alike(v1, v2):
    """Same codes and scales, zero points stored in two ways, some of them 0."""
    weights = []
    for case in (v1, v2):
        document = read(case)
        ((path, layer),) = document["layers"].items()
        tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
        scheme = GPTQScheme.build(dict(parsed(document).default.params), case)
        weights.append(scheme.decode(tensors, scheme.shape_of({s: t.shape for s, t in tensors.items()}, path), path))
    assert torch.equal(weights[0].zeros, weights[1].zeros)
    assert torch.equal(weights[0].codes, weights[1].codes)
    assert (weights[0].zeros == 0).any()


def test_reading_word_subtracted_zero_points_field_by_field_would_be_wrong():
    """Why the writer that the file names matters: neighbours of a zero point of 0 would be off by one."""
    document = read("w4g32-asym-v1")
    ((path, layer),) = document["layers"].items()
    tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
    params = dict(parsed(document).default.params)
    assert params.pop("zeros_offset") == "word"
    scheme = GPTQScheme.build(params, "test")
    weight = scheme.decode(tensors, scheme.shape_of({s: t.shape for s, t in tensors.items()}, path), path)
    assert not torch.equal(weight.dequantize(torch.float16), tensor(layer["dequantized"]))
