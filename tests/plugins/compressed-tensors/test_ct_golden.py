"""
Files that other tools wrote: their own configurations, their own bytes, their own dequantized weights.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from ct_files import GOLDEN, build, parse, read, tensor

from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import registry
from quantplug.schemes import SchemeCache
from quantplug.spec import LinearShape

CHECKPOINTS = sorted(path.stem for path in GOLDEN.glob("ct-*.json"))
LAYERS = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("ct-"))
SCHEMES = SchemeCache(registry())


def use_of(matcher: Matcher, path: str):
    return matcher.decide(ModuleInfo(path, "linear", class_name="Linear")).use


def test_the_cases_are_all_there():
    """Every format of the tool, mixed files, overlapping groups; act-order of an old version; uneven rows."""
    assert (len(CHECKPOINTS), len(LAYERS)) == (23, 8)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_corner_of_a_checkpoint_has_the_values_that_the_tool_gives_it(case):
    """From its configuration through the rules to the scheme, then to values: bit for bit in float32."""
    document = read(case)
    config = parse(document["config"])
    matcher = Matcher(config.rules, config.default)
    for path, layer in document["layers"].items():
        tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
        scheme = SCHEMES.get(use_of(matcher, path), case)
        shape = scheme.shape_of({suffix: tuple(stored.shape) for suffix, stored in tensors.items()}, path)
        assert shape == LinearShape(32, 128)
        values = scheme.decode(tensors, shape, path).dequantize()
        assert values[0].tolist() == layer["first_row"]
        assert hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest() == layer["sha256"]


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_packed_layers_are_written_as_the_tool_writes_them(case):
    """The same bytes, shapes and dtypes on the way back."""
    document = read(case)
    config = parse(document["config"])
    matcher = Matcher(config.rules, config.default)
    for path, layer in document["layers"].items():
        use = use_of(matcher, path)
        if use.name != "ct-pack":
            continue
        tensors = {suffix: tensor(spelled) for suffix, spelled in layer["tensors"].items()}
        scheme = SCHEMES.get(use, case)
        stored = scheme.encode(scheme.decode(tensors, LinearShape(32, 128), path))
        assert stored.keys() == tensors.keys()
        for suffix, written in stored.items():
            assert written.dtype == tensors[suffix].dtype
            assert torch.equal(written, tensors[suffix])


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_rules_say_of_every_linear_layer_what_is_stored(case):
    """Quantized layers in a scheme whose tensors they have, the head whole; and nothing to remark upon."""
    document = read(case)
    config = parse(document["config"])
    matcher = Matcher(config.rules, config.default)
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in document["stored"].items():
        path, _, suffix = name.rpartition(".")
        modules.setdefault(path, {})[suffix] = tuple(shape)
    linear = [path for path in modules if path.endswith("_proj")]
    assert len(linear) == 7
    for path in linear:
        scheme = SCHEMES.get(use_of(matcher, path), case)
        stored = {suffix: shape for suffix, shape in modules[path].items() if suffix not in ("k_scale", "v_scale")}
        assert {spec.suffix for spec in scheme.params(scheme.shape_of(stored, path)) if spec.required} == stored.keys()
    assert use_of(matcher, "lm_head") is None
    assert not matcher.report().unused
    assert not config.notes


@pytest.mark.parametrize("case", LAYERS)
def test_other_layers_decode_and_encode_as_their_makers_do(case):
    """Act-order, an order that was never filled in, and rows that fill no word."""
    document = read(case)
    weights = document["weights"]
    scheme = build(bits=weights["num_bits"], **{key: value for key, value in weights.items() if key != "num_bits"})
    tensors = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    values = tensor(document["dequantized"])
    weight = scheme.decode(tensors, LinearShape(*values.shape), case)
    assert torch.equal(weight.dequantize(), values)
    assert (weight.g_idx is not None) == case.endswith("-order")
    stored = scheme.encode(weight)
    if case.endswith("unfilled"):  # the trivial order is written out
        assert torch.equal(stored.pop("weight_g_idx"), torch.arange(128, dtype=torch.int32) // 32)
        assert bool((tensors.pop("weight_g_idx") == -1).all())
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(written, tensors[suffix]) for suffix, written in stored.items())


def test_the_cache_is_described_and_handed_over():
    """`kv_cache_scheme` of a file with FP8 keys and values."""
    cache = parse(read("ct-fp8-dynamic-kvcache-fp8")["config"]).kv_cache
    assert cache is not None
    assert cache.describe() == "float8_e4m3fn per tensor, static"
