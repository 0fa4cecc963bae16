"""
Mixed MXFP8 and BF16 checkpoints: an entry with a trailing dot keeps one layer whole, and that layer only.

From the files to loaded values, on a checkpoint whose layers are numbered 3, 34 and 340.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from mx_files import as_float32, build, stored_layer
from safetensors.torch import save_file

from quantplug.errors import CheckpointError, ConfigError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.load import load_layers
from quantplug.plan import Plan
from quantplug.planner import plan
from quantplug.plugins import build_registry
from quantplug.writeback import stored_tensors
from quantplug_mx import plugin

if TYPE_CHECKING:
    from pathlib import Path

REGISTRY = build_registry({"quantplug-mx": plugin})
HIDDEN, INNER = 64, 96
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
NUMBERS = (3, 34, 340)
SCHEME = build("mxfp8", scale_name="weight_scale_inv")
SKIP = "modules_to_not_convert"


def layer_paths(number: int) -> list[str]:
    return [f"model.layers.{number}.{name}" for name in LINEAR]


class Mixed:
    """A checkpoint of which some linear layers are quantized, and what its quantized layers are worth."""

    def __init__(self, whole: set[str]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.values: dict[str, np.ndarray] = {}
        generator = torch.Generator().manual_seed(1)
        for number in NUMBERS:
            for seed, (name, (n, k)) in enumerate(LINEAR.items()):
                path = f"model.layers.{number}.{name}"
                if path in whole:
                    self.tensors[f"{path}.weight"] = torch.randn(n, k, generator=generator).to(torch.bfloat16)
                else:
                    layer = stored_layer(SCHEME, n, k, seed + number)
                    self.tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in layer.tensors.items()}
                    self.values[path] = layer.values
            self.tensors[f"model.layers.{number}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        self.tensors["model.embed_tokens.weight"] = torch.randn(40, HIDDEN, generator=generator).to(torch.bfloat16)
        self.tensors["lm_head.weight"] = torch.randn(40, HIDDEN, generator=generator).to(torch.bfloat16)

    def write(self, directory: Path, skip: list[str], **fields: object) -> Path:
        section = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0", SKIP: skip, **fields}
        config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
        save_file(self.tensors, directory / "model.safetensors", {"format": "pt"})
        return directory


@pytest.fixture
def mixed() -> Mixed:
    return Mixed(set(layer_paths(34)))


def planned(directory: Path, **arguments: object) -> Plan:
    return plan(directory, platform="cpu", registry=REGISTRY, **arguments)


def quantized(made: Plan) -> set[str]:
    return {layer.path for layer in made.layers if layer.quantized}


def check_values(made: Plan, directory: Path, mixed: Mixed) -> None:
    """Load, and compare every quantized layer with the oracle, to the bit."""
    modules = load_layers(made, directory, registry=REGISTRY).modules
    assert modules.keys() == mixed.values.keys()
    for path, values in mixed.values.items():
        assert np.array_equal(modules[path].dequantize().numpy(), as_float32(values)), path


def test_the_layer_named_with_a_trailing_dot_stays_whole_and_no_other(mixed, tmp_path):
    """Plan, rules, load, values: all seven linear layers of 34 are BF16, those of 3 and 340 are MXFP8."""
    directory = mixed.write(tmp_path, ["lm_head", "model.embed_tokens", "model.layers.34."])
    made = planned(directory, strict=True)
    assert quantized(made) == set(layer_paths(3)) | set(layer_paths(340)) == mixed.values.keys()
    for path in layer_paths(34):
        layer = made.layer(path)
        assert (layer.rule, layer.scheme) == (f"model.layers.34. (config.json: quantization_config.{SKIP}[2])", "")
        assert layer.tensors == (f"{path}.weight",)
    assert made.layer("model.layers.340.mlp.up_proj").rule == "default of mxfp8"
    uses = {use.entry.text: (use.matched, use.decided) for use in made.entries if not use.entry.implied}
    assert uses["model.layers.34."][1] >= 7
    assert uses["model.embed_tokens"][0] == 1
    said = "'model.layers.34.' is read as the parent path 'model.layers.34': that module and all below it"
    assert [warning for warning in made.warnings if "slow reference kernel" not in warning] == [said]
    check_values(made, directory, mixed)


@pytest.mark.parametrize("entry", ["model.layers.34.", "model.layers.34", "model.layers.34.*", "layers.34."])
def test_every_spelling_of_the_layer_says_the_same(entry, mixed, tmp_path):
    """With or without the dot, as a glob, or without the root."""
    made = planned(mixed.write(tmp_path, ["lm_head", entry]), strict=True)
    assert quantized(made) == mixed.values.keys()


def test_layer_3_is_neither_34_nor_340(tmp_path):
    """The shorter number is a prefix of both others, as text."""
    mixed = Mixed(set(layer_paths(3)))
    directory = mixed.write(tmp_path, ["model.layers.3."])
    made = planned(directory, strict=True)
    assert quantized(made) == set(layer_paths(34)) | set(layer_paths(340))
    check_values(made, directory, mixed)


def test_an_entry_that_matches_nothing_is_reported_with_the_nearest_names(mixed, tmp_path):
    """35 is in no layer; the entry about 34 was used."""
    made = planned(mixed.write(tmp_path, ["model.layers.34.", "model.layers.35."]))
    unused = [use for use in made.entries if not use.matched and not use.entry.implied]
    assert [(use.entry.text, use.entry.origin) for use in unused] == [
        ("model.layers.35.", f"config.json: quantization_config.{SKIP}[1]")
    ]
    (warning,) = [warning for warning in made.warnings if "matches no module" in warning]
    assert warning.startswith(f"'model.layers.35.' (config.json: quantization_config.{SKIP}[1]) matches no module")
    assert "the nearest names are model.layers.3" in warning


def test_the_stored_tensors_decide_where_they_disagree_with_the_list(tmp_path):
    """A layer that the list keeps whole and the file quantizes, and the reverse: read as stored, and said."""
    surprise, forgotten = "model.layers.34.mlp.down_proj", "model.layers.3.self_attn.q_proj"
    mixed = Mixed(set(layer_paths(34)) - {surprise} | {forgotten})
    directory = mixed.write(tmp_path, ["lm_head", "model.layers.34."])
    made = planned(directory)
    assert quantized(made) == mixed.values.keys()
    assert made.layer(surprise).notes == (
        f"evidence: model.layers.34. (config.json: quantization_config.{SKIP}[1]) keeps it whole, but {surprise} is "
        "stored quantized",
    )
    assert made.layer(forgotten).notes == (
        f"evidence: default of mxfp8 assigns mxfp8, x float8_e4m3fn group 32, dynamic, but {forgotten} is stored dense",
    )
    assert {warning for warning in made.warnings if "evidence" in warning} == {
        *made.layer(surprise).notes, *made.layer(forgotten).notes,
    }  # fmt: skip
    check_values(made, directory, mixed)


@pytest.mark.parametrize("stored_whole", [True, False])
def test_strict_makes_the_disagreement_an_error(stored_whole, tmp_path):
    """Either way round."""
    path = "model.layers.3.mlp.up_proj" if stored_whole else "model.layers.34.mlp.up_proj"
    whole = set(layer_paths(34))
    directory = Mixed(whole | {path} if stored_whole else whole - {path}).write(tmp_path, ["model.layers.34."])
    with pytest.raises(ConfigError, match=f"{path} is stored {'dense' if stored_whole else 'quantized'}") as caught:
        planned(directory, strict=True)
    assert caught.value.code == "QP-SKIP-EVIDENCE"
    assert caught.value.where == path


def test_a_fused_module_follows_its_shards(mixed, tmp_path):
    """An engine's qkv_proj of layer 34 is whole; that of 340 has three segments, each with scales of its own."""
    directory = mixed.write(tmp_path, ["lm_head", "model.layers.34."])
    parts = ("q_proj", "k_proj", "v_proj")
    modules = [
        ModuleInfo(
            f"model.layers.{number}.self_attn.qkv_proj", "linear",
            shards=tuple(f"model.layers.{number}.self_attn.{part}" for part in parts),
        )
        for number in NUMBERS
    ]  # fmt: skip
    fused = {shard for module in modules for shard in module.shards}
    rest = [name.removesuffix(".weight") for name in mixed.tensors if name.endswith(".weight")]
    modules += [
        ModuleInfo(path, "linear" if path.endswith(("_proj", "lm_head")) else "other")
        for path in rest
        if path not in fused
    ]
    made = planned(directory, inventory=Inventory(tuple(modules)), strict=True)
    assert not made.layer("model.layers.34.self_attn.qkv_proj").quantized
    layer = made.layer("model.layers.340.self_attn.qkv_proj")
    assert [segment.shape.out_features for segment in layer.segments] == [64, 32, 32]
    values = np.concatenate([mixed.values[f"model.layers.340.self_attn.{part}"] for part in parts])
    loaded = load_layers(made, directory, registry=REGISTRY).modules[layer.path]
    assert np.array_equal(loaded.dequantize().numpy(), as_float32(values))


@pytest.mark.parametrize("change", ["weight_scale", "float8_e8m0fnu"])
def test_other_spellings_of_the_scales_give_the_same_values(change, mixed, tmp_path):
    """Under the other name, or with the dtype that says what the bytes are."""
    for name in list(mixed.tensors):
        if name.endswith("weight_scale_inv"):
            tensor = mixed.tensors.pop(name)
            if change == "weight_scale":
                mixed.tensors[name.removesuffix("_inv")] = tensor
            else:
                mixed.tensors[name] = tensor.view(torch.float8_e8m0fnu)
    directory = mixed.write(tmp_path, ["model.layers.34."])
    check_values(planned(directory, strict=True), directory, mixed)


def test_what_was_loaded_is_written_again_to_the_bit(mixed, tmp_path):
    """From the source, and from the kernel when the source is gone."""
    directory = mixed.write(tmp_path, ["model.layers.34."])
    modules = load_layers(planned(directory), directory, registry=REGISTRY).modules
    wanted = {name: t for name, t in mixed.tensors.items() if name.rpartition(".")[0] in mixed.values}
    for gone in (False, True):
        if gone:
            (directory / "model.safetensors").unlink()
        written = dict(stored_tensors(modules))
        assert written.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_layer_with_scales_of_both_names_is_refused_by_its_name(mixed, tmp_path):
    """Which of them belong to the codes, nobody says."""
    path = "model.layers.340.mlp.up_proj"
    mixed.tensors[f"{path}.weight_scale"] = mixed.tensors[f"{path}.weight_scale_inv"].clone()
    with pytest.raises(CheckpointError, match=f"{path}: its scales: are stored twice") as caught:
        planned(mixed.write(tmp_path, ["model.layers.34."]))
    assert caught.value.code == "QP-ST-EXTRA"


def test_a_layer_without_scales_is_refused_by_its_name(mixed, tmp_path):
    """Codes alone mean nothing."""
    path = "model.layers.3.mlp.up_proj"
    del mixed.tensors[f"{path}.weight_scale_inv"]
    with pytest.raises(CheckpointError, match=f"{path}: its scales: are not there") as caught:
        planned(mixed.write(tmp_path, ["model.layers.34."]))
    assert caught.value.code == "QP-ST-MISSING"


def test_a_dense_file_that_only_wishes_to_be_mxfp8_is_read_as_it_is(tmp_path):
    """Engines that quantize while loading put the method into dense checkpoints; every layer then says so."""
    everything = {path for number in NUMBERS for path in layer_paths(number)}
    made = planned(Mixed(everything).write(tmp_path, []))
    assert not quantized(made)
    assert sum("is stored dense" in warning for warning in made.warnings) == len(everything)
