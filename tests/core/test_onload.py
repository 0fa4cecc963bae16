"""Dense weights that are quantized while they are loaded, on the caller's wish."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from toy_checkpoints import dense_tensors, toy_checkpoint, toy_registry, write_checkpoint

from quantplug.config import resolve_config
from quantplug.convert import convert
from quantplug.entries import path_entries
from quantplug.errors import CheckpointError, ConfigError, ConvertError, PluginError
from quantplug.load import load_layers
from quantplug.onload import OnLoad, written_section
from quantplug.plan import Plan
from quantplug.planner import plan
from quantplug.writeback import stored_tensors
from quantplug_testkit import toys

if TYPE_CHECKING:
    from pathlib import Path

REGISTRY = toy_registry()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "dense", dense_tensors())


def planned(directory: Path, wish: OnLoad | str | None = "toy-7", **arguments: object) -> Plan:
    return plan(directory, platform="cpu", quantize=wish, registry=REGISTRY, **arguments)  # type: ignore[arg-type]


def test_the_layers_hold_the_rounded_weights_and_everything_else_stays_whole(dense: Path) -> None:
    made = planned(dense, OnLoad("toy-7", path_entries(["layers.1.mlp"], "skip")))
    quantized = [layer.path for layer in made.layers if layer.quantized]
    assert len(quantized) == 6
    assert not any("layers.1.mlp" in path or "lm_head" in path or "embed" in path for path in quantized)
    scheme = toys.ToyScheme.build({"limit": 7}, "test")
    modules = load_layers(made, dense, registry=REGISTRY).modules
    for path in quantized:
        wanted = scheme.quantize(dense_tensors()[f"{path}.weight"])
        assert torch.equal(modules[path].dequantize(), wanted.dequantize())
    assert made.layer("model.layers.0.mlp.up_proj").rule == "quantized on load, as the caller wishes"
    assert made.layer("model.layers.1.mlp.up_proj").rule == "layers.1.mlp (skip[0])"
    assert [(field.value, field.origin) for field in made.fields] == [("toy-7", "caller")]


def test_a_bias_of_a_dense_layer_comes_along(dense: Path) -> None:
    module = load_layers(planned(dense), dense, registry=REGISTRY).modules["model.layers.0.self_attn.q_proj"]
    y = module(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
    assert torch.equal(y[0], dense_tensors()["model.layers.0.self_attn.q_proj.bias"])


def test_the_plan_survives_json_and_its_hash_tells_it_from_a_stored_one(dense: Path, tmp_path: Path) -> None:
    made = planned(dense)
    assert Plan.from_json(made.to_json()) == made
    stored = plan(toy_checkpoint(tmp_path / "stored", limit=7), platform="cpu", registry=REGISTRY)
    assert made.hash != stored.hash


def test_it_is_written_as_a_conversion_writes_it(dense: Path, tmp_path: Path) -> None:
    made = planned(dense)
    written = dict(stored_tensors(load_layers(made, dense, registry=REGISTRY).modules))
    convert(dense, tmp_path / "out", scheme="toy", params={"limit": 7}, registry=REGISTRY)
    again = plan(tmp_path / "out", platform="cpu", registry=REGISTRY, strict=True)
    converted = dict(stored_tensors(load_layers(again, tmp_path / "out", registry=REGISTRY).modules))
    assert written.keys() == converted.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in converted.items())
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written_section(made, REGISTRY) == section


def test_it_is_written_from_the_kernel_when_the_source_is_gone(dense: Path) -> None:
    modules = load_layers(planned(dense), dense, registry=REGISTRY).modules
    wanted = dict(stored_tensors(modules))
    (dense / "model.safetensors").unlink()
    found = dict(stored_tensors(modules))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_wish_that_says_what_the_file_says_is_granted(tmp_path: Path) -> None:
    stored = toy_checkpoint(tmp_path / "stored", limit=7)
    assert planned(stored).hash == planned(stored, None).hash


@pytest.mark.parametrize("wish", [OnLoad("toy"), OnLoad("toy-7", path_entries(["lm_head"], "skip"))])
def test_a_wish_against_the_file_is_refused(tmp_path: Path, wish: OnLoad) -> None:
    stored = toy_checkpoint(tmp_path / "stored", limit=7)
    with pytest.raises(ConfigError, match="already quantized by toy") as raised:
        planned(stored, wish)
    assert raised.value.code == "QP-CFG-CONTRADICTION"
    assert planned(stored, None).layers


def test_an_unknown_recipe_is_refused_with_those_there_are(dense: Path) -> None:
    with pytest.raises(PluginError, match="toy-7") as raised:
        planned(dense, "toy-8")
    assert raised.value.code == "QP-PLUG-MISSING"


def test_a_layer_that_the_format_cannot_describe_is_named_with_the_way_out(dense: Path) -> None:
    class Even(toys.ToyScheme):
        name = "even"

        @classmethod
        def recipes(cls):
            return {"even": {}}

        def params(self, shape):
            if shape.in_features % 32:
                raise ConfigError("QP-CFG-FIELD", "even", f"{shape.in_features} inputs", expected="a multiple of 32")
            return super().params(shape)

    class Plugin:
        quantplug_api = ">=1,<2"
        quantplug_schemes = staticmethod(toys.hookimpl(specname="quantplug_schemes")(lambda: [Even]))

    registry = toy_registry(even=Plugin())
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj: 48 inputs.*skip=") as raised:
        plan(dense, platform="cpu", quantize="even", registry=registry)
    assert raised.value.code == "QP-CFG-FIELD"
    skipped = OnLoad("even", path_entries(["mlp.down_proj"], "skip"))
    assert plan(dense, platform="cpu", quantize=skipped, registry=registry).layers


def test_a_dense_weight_that_is_not_finite_is_named_and_the_next_load_works(dense: Path) -> None:
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    write_checkpoint(dense, tensors)
    with pytest.raises(ConvertError, match=r"layers\.1\.mlp\.up_proj: is not finite at \[3, 5\]"):
        load_layers(planned(dense), dense, registry=REGISTRY)
    write_checkpoint(dense, dense_tensors())
    assert load_layers(planned(dense), dense, registry=REGISTRY).modules


def test_integers_are_no_dense_weights(dense: Path) -> None:
    tensors = dense_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    write_checkpoint(dense, tensors)
    with pytest.raises(CheckpointError, match="dtype int8") as raised:
        planned(dense)
    assert raised.value.code == "QP-ST-DTYPE"


def test_a_name_that_suggests_a_grid_is_remarked_on_and_nothing_follows(tmp_path: Path) -> None:
    named = write_checkpoint(tmp_path / "tiny-it-qat-toy-7-unquantized", dense_tensors())
    made = planned(named, None)
    assert not any(layer.quantized for layer in made.layers)
    assert any("quantize='toy-7'" in warning for warning in made.warnings)
    assert not any("suggests" in warning for warning in planned(named).warnings)
    plain = write_checkpoint(tmp_path / "toyish-70b", dense_tensors())
    assert not any("suggests" in warning for warning in planned(plain, None).warnings)


def test_the_grid_can_be_left_to_the_card_which_must_name_exactly_one(dense: Path) -> None:
    with pytest.raises(ConfigError, match="names no grid") as raised:
        planned(dense, "card")
    assert raised.value.code == "QP-CFG-OVERRIDE"
    (dense / "README.md").write_text("---\ntags: [qat, toy-7]\n---\nUse `toy` too.\n")
    assert planned(dense, "card").hash == planned(dense, "toy-7").hash
    assert [(f.value, f.origin) for f in planned(dense, "card").fields] == [("toy-7", "README.md: metadata")]
    assert any("the model card names the grid 'toy-7'" in warning for warning in planned(dense, None).warnings)
    (dense / "README.md").write_text("---\ntags:\n- toy\n- toy-7\n---\n")
    with pytest.raises(ConfigError, match="names toy, toy-7"):
        planned(dense, "card")
    (dense / "README.md").write_bytes(b"---\n\xff\xfe toy-7 without an end")
    with pytest.raises(ConfigError, match="names no grid"):
        planned(dense, "card")


def test_the_same_function_resolves_a_draft_from_its_own_directory(dense: Path, tmp_path: Path) -> None:
    draft = toy_checkpoint(tmp_path / "draft", limit=7)
    assert resolve_config(dense, REGISTRY).default is None
    kept = resolve_config(draft, REGISTRY)
    assert kept.default is not None
    assert resolve_config(draft, REGISTRY, quantize=OnLoad("toy-7")).default == kept.default
