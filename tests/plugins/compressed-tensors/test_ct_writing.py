"""
What is written about a converted checkpoint, read again; and a conversion as a whole.
"""

from __future__ import annotations

import json

import pytest
import torch
from ct_files import group, parse, read, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.convert import convert
from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.load import load_layers
from quantplug.matcher import Matcher
from quantplug.planner import plan
from quantplug.plugins import registry
from quantplug.schemes import SchemeCache
from quantplug.skip import Entry, EntryKind, SchemeRef
from quantplug.spec import LinearShape
from quantplug_compressed_tensors.dialect import CompressedTensorsDialect
from quantplug_testkit.checkpoints import safetensors_bytes

DESCRIBED = {
    "ct-pack": (
        {"bits": 4}, {"bits": 3, "group_size": 64, "symmetric": False}, {"bits": 8, "strategy": "tensor"},
        {"bits": 2, "strategy": "group", "group_size": 32, "actorder": "group", "activation": "int8/token/dynamic"},
        {"bits": 4, "strategy": "channel", "group_size": -1, "actorder": "weight"},
        {"bits": 4, "activation": "uint8/tensor/static"},
    ),
    "int8": (
        {}, {"bits": 4, "strategy": "group", "group_size": 32},
        {"symmetric": False, "activation": "int8/tensor/static"},
        {"strategy": "block", "block_n": 64}, {"activation": "float8_e4m3fn/token/dynamic", "strategy": "tensor"},
    ),
    "fp8": (
        {"strategy": "channel", "activation": "float8_e4m3fn/token/dynamic"}, {"strategy": "tensor"},
        {"strategy": "block", "activation": "float8_e4m3fn/group128/dynamic"}, {"strategy": "group", "group_size": 64},
        {"activation": "float8_e4m3fn/tensor/static", "element": "float8_e4m3fn", "scale_name": "weight_scale"},
    ),
    "mxfp8": ({}, {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}),
    "mxfp4": (
        {}, {"activation": "float4_e2m1fn/group32/dynamic/float8_e8m0fnu"},
        {"activation": "float8_e4m3fn/group128/dynamic"},
    ),
    "nvfp4": ({}, {"activation": "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"}),
}  # fmt: skip
REFS = [SchemeRef(name, tuple(sorted(params.items()))) for name, sets in DESCRIBED.items() for params in sets]
SCHEMES = SchemeCache(registry())
PATHS = [
    f"model.layers.{layer}.{name}" for layer in (1, 11) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate")
]
PATHS += ["lm_head", "model.lm_head", "layers.1.mlp.gate", "Head"]


def written(base: SchemeRef, layers: dict[str, SchemeRef], dense: tuple[str, ...] = ()) -> dict:
    """Return the section as it comes back from a file."""
    return json.loads(json.dumps(CompressedTensorsDialect().write(base, layers, dense)))


def same(found: SchemeRef | None, wanted: SchemeRef | None) -> bool:
    return (found is None) == (wanted is None) and (
        found is None or wanted is None or SCHEMES.get(found, "found") == SCHEMES.get(wanted, "wanted")
    )


def test_every_scheme_that_a_dialect_may_write_here_is_tried():
    assert DESCRIBED.keys() == CompressedTensorsDialect.writes
    assert all(registry().dialect_writing(name).item.name == "compressed-tensors" for name in DESCRIBED)


@pytest.mark.parametrize("ref", REFS, ids=str)
def test_one_scheme_for_all_layers_is_read_back(ref):
    """One group of the class "Linear", whose format needs no inference, and nothing to remark upon."""
    config = parse(written(ref, dict.fromkeys(PATHS[:6], ref), ("lm_head",)))
    matcher = Matcher(config.rules, config.default)
    for path in PATHS[:6]:
        assert same(matcher.decide(ModuleInfo(path, "linear", class_name="Linear")).use, ref)
    assert matcher.decide(ModuleInfo("lm_head", "linear", class_name="Linear")).use is None
    assert not config.notes
    assert not matcher.report().unused


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from(REFS), uses=st.lists(st.sampled_from([None, *REFS]), min_size=len(PATHS), max_size=len(PATHS))
)
def test_any_assignment_is_read_back(base, uses):
    """Every layer its own scheme or none; names that are endings of others, or look like classes, stay apart."""
    layers = {path: use for path, use in zip(PATHS, uses, strict=True) if use is not None}
    dense = tuple(path for path, use in zip(PATHS, uses, strict=True) if use is None)
    config = parse(written(base, layers, dense))
    matcher = Matcher(config.rules, config.default)
    for path, use in zip(PATHS, uses, strict=True):
        assert same(matcher.decide(ModuleInfo(path, "linear", class_name="Linear")).use, use), path
    assert same(config.default, base)


def test_formats_are_those_of_the_groups():
    """One for all, or mixed-precision; groups of equal layers are one."""
    pack, fp8 = REFS[0], SchemeRef("fp8", (("strategy", "channel"),))
    section = written(pack, {"a.b": pack, "a.c": pack})
    assert section["format"] == "pack-quantized"
    assert list(section["config_groups"]) == ["group_0"]
    section = written(pack, {"a.b": pack, "a.c": fp8, "a.d": fp8})
    assert section["format"] == "mixed-precision"
    assert section["config_groups"]["group_1"]["targets"] == ["a.c", "a.d"]
    assert [item["format"] for item in section["config_groups"].values()] == ["pack-quantized", "naive-quantized"]
    assert section["quantization_status"] == "compressed"


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("fp8", {"strategy": "channel", "element": "float8_e5m2"}, "element is the string 'float8_e5m2'.*no words"),
        ("fp8", {"strategy": "channel", "scale_name": "weight_scale_inv"}, "scale_name"),
        ("fp8", {"strategy": "channel", "activation": "float8_e5m2/token/dynamic"}, "float8_e5m2 is a type"),
        ("nvfp4", {"global_name": "weight_scale_2"}, "global_name"),
        ("mxfp4", {"weight_name": "weight"}, "weight_name"),
    ],
)
def test_what_has_no_words_is_refused(name, params, words):
    ref = SchemeRef(name, tuple(sorted(params.items())))
    with pytest.raises(ConfigError, match=words) as caught:
        written(ref, {"a.b": ref})
    assert caught.value.code == "QP-CFG-FIELD"


# -- whole conversions


def dense_checkpoint(directory, grid: torch.Generator) -> dict[str, torch.Tensor]:
    """Write a checkpoint of three linear layers and a norm, BF16; one layer lies on the q4_0 grid."""
    weights = {
        "model.layers.0.mlp.up_proj": torch.randn(24, 64, generator=grid) * 0.02,
        "model.layers.0.mlp.down_proj": torch.randint(-8, 8, (16, 96), generator=grid)
        * (torch.rand(16, 3, generator=grid) * 0.01).half().float().repeat_interleave(32, 1),
        "lm_head": torch.randn(32, 64, generator=grid),
    }
    tensors = {f"{path}.weight": weight.bfloat16() for path, weight in weights.items()}
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    stored = {
        name: ("BF16", t.shape, bytes(t.contiguous().view(torch.uint8).flatten().tolist()))
        for name, t in tensors.items()
    }
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(safetensors_bytes(stored))
    (directory / "config.json").write_text(json.dumps({"model_type": "none", "architectures": ["NoneForCausalLM"]}))
    return tensors


@pytest.mark.parametrize("recipe", ["int4-g32", "uint4-g64", "int4-channel", "q4_0", "fp8", "mxfp4", "w8a8"])
def test_a_conversion_is_planned_and_loaded_as_what_it_was_written_as(tmp_path, recipe):
    """By the names of recipes, of this plugin and of others that it describes; the head stays whole."""
    tensors = dense_checkpoint(tmp_path / "dense", torch.Generator().manual_seed(3))
    offer = registry().recipe(recipe).item
    convert(tmp_path / "dense", tmp_path / "out", scheme=offer.scheme, params=offer.params)
    made = plan(tmp_path / "out", platform="cpu", dtype="float32", strict=True)
    modules = load_layers(made, tmp_path / "out").modules
    assert modules.keys() == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    scheme = registry().scheme(offer.scheme).item.build(dict(offer.params), recipe)
    for path, module in modules.items():
        wanted = scheme.quantize(tensors[f"{path}.weight"]).dequantize()
        assert torch.equal(module.dequantize(), wanted)
    if recipe == "q4_0":
        values = modules["model.layers.0.mlp.down_proj"].dequantize(torch.bfloat16)
        assert torch.equal(values.view(torch.int16), tensors["model.layers.0.mlp.down_proj.weight"].view(torch.int16))


def test_a_layer_left_out_is_ignored_by_name(tmp_path):
    """`skip` ends up in `ignore`, and the plan finds nothing to remark upon."""
    dense_checkpoint(tmp_path / "dense", torch.Generator().manual_seed(4))
    skip = (Entry("up_proj", EntryKind.SUFFIX, "up_proj", "test"),)
    report = convert(
        tmp_path / "dense", tmp_path / "out", scheme="ct-pack", params={"bits": 8, "symmetric": False}, skip=skip
    )
    assert report.dense == ("model.layers.0.mlp.up_proj", "lm_head")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert not plan(tmp_path / "out", platform="cpu", strict=True).warnings


def test_a_grid_whose_scales_do_not_fit_says_what_to_ask_for(tmp_path):
    """And leaves nothing behind; asked for float32 scales, it is written."""
    directory = tmp_path / "dense"
    dense_checkpoint(directory, torch.Generator().manual_seed(5))
    tiny = torch.full((16, 64), 2.0**-40, dtype=torch.bfloat16)
    stored = {"a.proj.weight": ("BF16", tiny.shape, bytes(tiny.view(torch.uint8).flatten().tolist()))}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(stored))
    params = {"bits": 4, "group_size": 32, "grid": "q4_0"}
    with pytest.raises(ConvertError, match="scale_dtype=float32"):
        convert(directory, tmp_path / "out", scheme="ct-pack", params=params)
    assert not (tmp_path / "out").exists()
    convert(directory, tmp_path / "out", scheme="ct-pack", params={**params, "scale_dtype": "float32"})
    modules = load_layers(plan(tmp_path / "out", platform="cpu", dtype="float32"), tmp_path / "out").modules
    assert torch.equal(modules["a.proj"].dequantize(torch.bfloat16), tiny)


def test_where_packed_rows_fit_several_sizes_the_models_counts(tmp_path):
    """45 inputs of 4 bits fill five words and a half: names cannot tell, `weight_shape` contradicts, a model can."""
    document = read("uneven-w4")
    tensors = {suffix: tensor(spelled) for suffix, spelled in document["tensors"].items()}
    names = {torch.int32: "I32", torch.int64: "I64", torch.float32: "F32"}
    stored = {
        f"a.proj.{suffix}": (names[t.dtype], t.shape, bytes(t.contiguous().view(-1).view(torch.uint8).tolist()))
        for suffix, t in tensors.items()
    }
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(stored))
    section = {"quant_method": "compressed-tensors", "config_groups": {"g": group(["Linear"], **document["weights"])}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none", "quantization_config": section}))
    bare = plan(tmp_path, platform="cpu", dtype="float32")
    with pytest.raises(
        CheckpointError, match=r"weight_shape: says \[11, 45\].*\[11, 48\].*plan with the model"
    ) as caught:
        load_layers(bare, tmp_path)
    assert caught.value.code == "QP-ST-SHAPE"
    inventory = Inventory((ModuleInfo("a.proj", "linear", class_name="Linear", shape=LinearShape(11, 45)),))
    made = plan(tmp_path, platform="cpu", dtype="float32", inventory=inventory)
    values = load_layers(made, tmp_path).modules["a.proj"].dequantize()
    assert torch.equal(values, tensor(document["dequantized"]))
    inventory = Inventory((ModuleInfo("a.proj", "linear", class_name="Linear", shape=LinearShape(11, 40)),))
    with pytest.raises(CheckpointError, match="11 x 40, as the model has it"):
        plan(tmp_path, platform="cpu", inventory=inventory)
