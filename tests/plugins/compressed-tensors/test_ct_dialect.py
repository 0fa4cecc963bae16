"""
Configurations: every format and its scheme, defaults as the format's own reader has them, priority, and every refusal.
"""

from __future__ import annotations

import itertools
import json

import pytest
from ct_files import DOWN, FLOAT8, MX4, NV, TOKEN8, UP, WHERE, group, one, parse, read, section

from quantplug.config import RawConfig, resolve_config
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.plugins import registry
from quantplug.skip import SchemeRef
from quantplug_compressed_tensors.dialect import CompressedTensorsDialect
from quantplug_compressed_tensors.formats import infer_format


def use_of(config, path: str, class_name: str = "Linear", shards: tuple[str, ...] = ()) -> SchemeRef | None:
    module = ModuleInfo(path, "linear", class_name=class_name, shards=shards)
    return Matcher(config.rules, config.default).decide(module).use


def ref(name: str, **params: object) -> SchemeRef:
    return SchemeRef(name, tuple(sorted(params.items())))


READ = {
    "packed groups": (one(group_size=128), ref("ct-pack", bits=4, group_size=128)),
    "packed, without zeros by name": (
        one(group_size=64, symmetric=False),
        ref("ct-pack", bits=4, group_size=64, symmetric=False),
    ),
    "packed rows": (one(strategy="channel", num_bits=8), ref("ct-pack", bits=8)),
    "rows by size": (one(group_size=-1), ref("ct-pack", bits=4)),
    "no word about sharing": (one(), ref("ct-pack", bits=4, strategy="tensor")),
    "an order of groups": (
        one(group_size=32, actorder="group"),
        ref("ct-pack", bits=4, group_size=32, actorder="group"),
    ),
    "the same, dynamic": (
        one(group_size=32, actorder="Dynamic"),
        ref("ct-pack", bits=4, group_size=32, actorder="group"),
    ),
    "the same, true": (one(group_size=32, actorder=True), ref("ct-pack", bits=4, group_size=32, actorder="group")),
    "an order of weights": (
        one(group_size=32, actorder="static"),
        ref("ct-pack", bits=4, group_size=32, actorder="weight"),
    ),
    "no order": (one(group_size=32, actorder=False), ref("ct-pack", bits=4, group_size=32)),
    "packed with quantized x": (
        one(TOKEN8, "pack-quantized", group_size=32),
        ref("ct-pack", bits=4, group_size=32, activation="int8/token/dynamic"),
    ),
    "packed with x in FP8": (
        one({"num_bits": 8, "type": "FLOAT", "strategy": "TOKEN", "dynamic": True}, "pack-quantized", group_size=32),
        ref("ct-pack", bits=4, group_size=32, activation="float8_e4m3fn/token/dynamic"),
    ),
    "W8A8": (one(TOKEN8, num_bits=8, strategy="channel"), ref("int8", activation="int8/token/dynamic")),
    "W4A8": (
        one(TOKEN8, group_size=32),
        ref("int8", activation="int8/token/dynamic", bits=4, group_size=32, strategy="group"),
    ),
    "W8A8, static and asymmetric": (
        one({"num_bits": 8, "symmetric": False}, num_bits=8, strategy="tensor"),
        ref("int8", activation="uint8/tensor/static", strategy="tensor"),
    ),
    "int8, weights only": (one(form="int-quantized", num_bits=8, strategy="channel"), ref("int8")),
    "naive int8": (one(form="naive-quantized", num_bits=8, strategy="channel"), ref("int8")),
    "FP8, weights only": (one(**FLOAT8), ref("fp8")),
    "FP8, static": (
        one({"num_bits": 8, "type": "float"}, **{**FLOAT8, "strategy": "tensor"}),
        ref("fp8", activation="float8_e4m3fn/tensor/static", strategy="tensor"),
    ),
    "FP8 in blocks": (
        one(
            {"num_bits": 8, "type": "float", "group_size": 128, "dynamic": True},
            **{**FLOAT8, "strategy": "block", "block_structure": [64, 128]},
        ),
        ref("fp8", activation="float8_e4m3fn/group128/dynamic", strategy="block", block_n=64, block_k=128),
    ),
    "FP8 in blocks, an old spelling": (
        one(**{**FLOAT8, "strategy": "block", "block_structure": "128x64"}),
        ref("fp8", strategy="block", block_n=128, block_k=64),
    ),
    "FP8 in groups": (
        one(**{**FLOAT8, "strategy": "group", "group_size": 64}),
        ref("fp8", strategy="group", group_size=64),
    ),
    "MXFP8": (one(**{**MX4, "num_bits": 8}), ref("mxfp8")),
    "MXFP8 with x": (
        one({**MX4, "num_bits": 8, "dynamic": True}, **{**MX4, "num_bits": 8}),
        ref("mxfp8", activation="float8_e4m3fn/group32/dynamic/float8_e8m0fnu"),
    ),
    "MXFP4": (one(**MX4), ref("mxfp4")),
    "MXFP4 with x in FP8": (
        one({"num_bits": 8, "type": "float", "group_size": 128, "dynamic": True}, **MX4),
        ref("mxfp4", activation="float8_e4m3fn/group128/dynamic"),
    ),
    "NVFP4": (one(**NV), ref("nvfp4")),
    "NVFP4 with x": (
        one({**NV, "dynamic": "local"}, **NV),
        ref("nvfp4", activation="float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_groups_mean(name):
    """Formats that are not named are inferred, and that is said; every scheme builds from its reference."""
    fields, wanted = READ[name]
    config = parse(fields)
    assert config.default == wanted
    assert use_of(config, UP) == wanted
    assert registry().scheme(wanted.name).item.build(dict(wanted.params), name)
    named = "format" in fields["config_groups"]["group_0"]
    assert [note for note in config.notes if "follows from its arguments" in note] == ([] if named else [*config.notes])
    assert len(config.notes) == (not named)


@pytest.mark.parametrize("case", ["ct-w4a16-asym-g64", "ct-w8a8-int8", "ct-fp8-block", "ct-fp8-weightonly", "ct-mxfp8",
    "ct-mxfp4", "ct-nvfp4", "ct-w4afp8-g64", "ct-mixed-fp8attn-w4a16mlp"])  # fmt: skip
def test_a_format_that_goes_without_saying_is_the_one_the_tool_wrote(case):
    """Of real files, with every `format` taken out."""
    fields = json.loads(json.dumps(read(case)["config"]))
    whole = parse(fields)
    del fields["format"]
    for item in fields["config_groups"].values():
        del item["format"]
    bare = parse(fields)
    assert (bare.default, bare.rules) == (whole.default, whole.rules)
    assert len(bare.notes) == len(fields["config_groups"])


def test_a_groups_own_format_counts_before_that_of_the_file():
    """Said aloud, unless the file's is "mixed-precision" or one that groups replace."""
    for shared, notes in (("mixed-precision", 0), ("dense", 0), ("int-quantized", 0), ("pack-quantized", 1)):
        fields = one(TOKEN8, "int-quantized", num_bits=8, strategy="channel") | {"format": shared}
        config = parse(fields)
        assert config.default.name == "int8"
        assert len(config.notes) == notes
    config = parse(one(group_size=32) | {"format": "pack-quantized"})
    assert (config.default.name, config.notes) == ("ct-pack", ())
    config = parse(one(group_size=32) | {"format": "mixed-precision"})
    assert "names no format: 'pack-quantized' follows" in config.notes[0]


@pytest.mark.parametrize("method", CompressedTensorsDialect.methods)
def test_it_is_found_by_its_methods_and_in_either_section(tmp_path, method):
    """`quantization_config` and `compression_config`; what old writers nested is brought up."""
    fields = one(group_size=32) | {"quant_method": method}
    nested = {"quant_method": method, "sparsity_config": {"format": "dense"}, "quantization_config": one(group_size=32)}
    for key, content in (
        ("quantization_config", fields),
        ("compression_config", fields),
        ("compression_config", nested),
    ):
        (tmp_path / "config.json").write_text(json.dumps({key: content}))
        config = resolve_config(tmp_path, registry())
        assert config.dialect == "compressed-tensors"
        assert config.default == ref("ct-pack", bits=4, group_size=32)


# -- priority

FOUR = {
    "a": group(["Linear"], group_size=32),
    "b": group(["re:.*down_proj$"], group_size=64),
    "c": group([DOWN], group_size=128),
    "d": group(["re:.*mlp.*"], group_size=16),
}


@pytest.mark.parametrize("order", list(itertools.permutations(FOUR)), ids="".join)
def test_the_order_of_groups_never_matters(order):
    """
    A layer's own name, then expressions by their text, then classes; the same rules whatever the order of keys.

    The same four groups in compressed_tensors 0.20 come to the same for these layers, in every order.
    """
    config = parse(section() | {"config_groups": {name: FOUR[name] for name in order}})
    again = parse(section() | {"config_groups": FOUR})
    assert [(r.entry.text, r.use) for r in config.rules] == [(r.entry.text, r.use) for r in again.rules]
    assert config.default == again.default
    assert config.notes == again.notes
    sizes = {
        path: dict(use_of(config, path).params)["group_size"]
        for path in (UP, DOWN, "model.layers.2.mlp.down_proj", "head")
    }
    assert sizes == {UP: 16, DOWN: 128, "model.layers.2.mlp.down_proj": 64, "head": 32}


def test_of_names_the_longest_wins():
    """Two suffixes of one layer's path, whichever comes first."""
    groups = [group(["up_proj"], group_size=32), group(["mlp.up_proj"], group_size=64), group([UP], group_size=128)]
    for order in itertools.permutations(groups):
        config = parse(section(*order))
        assert dict(use_of(config, UP).params)["group_size"] == 128
        assert dict(use_of(config, "model.layers.2.mlp.up_proj").params)["group_size"] == 64
        assert dict(use_of(config, "other.up_proj").params)["group_size"] == 32
        assert use_of(config, "model.layers.1.mlp.gate_up_proj") is None


def test_the_class_linear_means_every_linear_layer():
    """Whatever an engine calls it; other classes mean themselves, and without `Linear` nothing else is quantized."""
    config = parse(section(group(["Linear"], group_size=32), group(["Conv2d"], group_size=64)))
    assert dict(use_of(config, UP, "QKVParallelLinear").params)["group_size"] == 32
    assert dict(use_of(config, UP, "Conv2d").params)["group_size"] == 64
    assert use_of(parse(section(group(["Conv2d"], group_size=64))), UP) is None


def test_shards_of_a_fused_layer_are_decided_by_their_names():
    """Two expressions of one group cover both shards; the fused name need not be named."""
    config = parse(section(group(["re:.*(gate|up)_proj$"], group_size=32)))
    shards = ("model.layers.1.mlp.gate_proj", UP)
    assert use_of(config, "model.layers.1.mlp.gate_up_proj", shards=shards) == ref("ct-pack", bits=4, group_size=32)


def test_ignore_counts_before_every_target():
    """Names, their last components, classes and expressions."""
    for entry in (UP, "up_proj", "mlp.up_proj", "re:.*up_proj", r"re:model\.layers\.1\."):
        config = parse(section(group([UP], group_size=32), ignore=[entry]))
        assert use_of(config, UP) is None
    assert use_of(parse(section(group([UP], group_size=32), ignore=["re:up_proj", "down_proj"])), UP) is not None
    assert use_of(parse(section(group([UP], group_size=32), ignore=["Linear"])), UP) is None


def test_one_target_in_two_groups_that_differ_is_an_error_that_names_both():
    """Whatever the order of keys; groups that agree are harmless."""
    for targets in (["Linear"], [UP], ["re:.*up_proj$"]):
        for sizes in ((32, 64), (64, 32)):
            with pytest.raises(ConfigError, match=r"group_1\.targets\[0\].*group_0\.targets\[0\]") as caught:
                parse(section(*(group(targets, group_size=size) for size in sizes)))
            assert caught.value.code == "QP-CFG-CONTRADICTION"
        parse(section(group(targets, group_size=32), group(targets, group_size=32)))


# -- what stays whole, and the cache


def test_groups_without_weights_leave_them_whole_and_say_so():
    """Quantized attention, or activations of dense layers."""
    config = parse(section(group(["Linear"], group_size=32), {"targets": [UP], "input_activations": TOKEN8}))
    assert use_of(config, UP) is None
    assert use_of(config, DOWN) is not None
    assert any("group_1 has no weights" in note and "activations are left as they are" in note for note in config.notes)
    config = parse(section({"targets": ["Linear"], "weights": None}))
    assert (config.default, use_of(config, UP)) == (None, None)


def test_a_quantized_cache_alone_is_a_configuration():
    """No group, only `kv_cache_scheme`."""
    config = parse(section(kv_cache_scheme={"num_bits": 8, "symmetric": False, "dynamic": True, "strategy": "token"}))
    assert config.kv_cache.describe() == "uint8 per token, dynamic"
    assert use_of(config, UP) is None


def test_keys_that_say_nothing_about_tensors_are_listed_and_unknown_ones_noted():
    fields = one(form="pack-quantized", group_size=32) | {
        "version": "0.20.0", "global_compression_ratio": 1.5, "quantization_status": "frozen", "sparsity_config": {},
        "transform_config": {"config_groups": {}}, "moe_sparsity_config": None, "kv_cache_scheme": None, "novelty": 1,
    }  # fmt: skip
    fields["config_groups"]["group_0"]["weights"] |= {
        "observer": "mse",
        "observer_kwargs": {"maxshrink": 0.2},
        "zp_dtype": None,
    }
    config = parse(fields)
    assert config.notes == (f"{WHERE}.novelty is not known to this reader and left out of account",)
    assert {field.name for field in config.fields} == fields.keys()
    dense = {
        "format": "dense",
        "global_sparsity": 0.14,
        "sparsity_structure": "unstructured",
        "registry_requires_subclass": False,
    }
    assert not parse(one(form="pack-quantized", group_size=32) | {"sparsity_config": dense}).notes


def test_costly_but_bounded_expressions_are_matched_in_time():
    """The longest name, and an expression of many gaps: the core's vetting lets it run, and it ends at once."""
    config = parse(section(group(["re:.*layers.*mlp.*experts.*gate.*proj.*weight.*x$"], group_size=32)))
    assert use_of(config, ".".join(["layers.mlp.experts.gate.proj.weight"] * 14)) is None


def test_inference_prefers_what_the_tool_tries_first():
    """`infer_format` of arguments that several formats could hold."""
    from quantplug_compressed_tensors.args import read_args

    weights = read_args({**MX4, "scale_dtype": None}, "test")
    assert infer_format(weights, None) == "mxfp4-pack-quantized"
    weights = read_args({**MX4, "num_bits": 8, "scale_dtype": None}, "test")  # without MX scales it is plain FP8
    assert infer_format(weights, None) == "naive-quantized"
    assert infer_format(weights, weights) == "float-quantized"


def test_a_section_without_a_place_is_read():
    """Frameworks hand over fields without saying where they come from."""
    fields = one(group_size=32)
    config = CompressedTensorsDialect().parse(RawConfig("compressed-tensors", fields, {}, {}))
    assert config.default == ref("ct-pack", bits=4, group_size=32)
