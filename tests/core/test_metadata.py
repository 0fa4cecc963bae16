"""`__metadata__` of safetensors files: kept from all files, and shown to the scheme of the layer that it speaks of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file
from toy_checkpoints import toy_checkpoint, toy_registry

from quantplug.checkpoint import open_checkpoint
from quantplug.errors import ConfigError
from quantplug.evidence import StoredModules
from quantplug.planner import plan
from quantplug_testkit.checkpoints import filled, safetensors_bytes, write_checkpoint
from quantplug_testkit.toys import ToyScheme

if TYPE_CHECKING:
    from pathlib import Path

QUERY, UP, NORM = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.norm"
ONE, TWO = {"a": filled("F32", (1,))}, {"b": filled("F32", (2,))}


def describe(directory: Path, metadata: dict[str, str]) -> Path:
    """Write the file again with other metadata."""
    save_file(load_file(directory / "model.safetensors"), directory / "model.safetensors", metadata)
    return directory


def test_what_all_files_say_is_kept_and_a_contradiction_is_a_warning(tmp_path):
    """The first file counts; files that agree, or speak of other things, go without a word."""
    write_checkpoint(tmp_path, shards={"one.safetensors": ONE, "two.safetensors": TWO})

    def read(first, second):
        for file, tensors, metadata in (("one", ONE, first), ("two", TWO, second)):
            (tmp_path / f"{file}.safetensors").write_bytes(safetensors_bytes(tensors, metadata=metadata))
        checkpoint = open_checkpoint(tmp_path)
        return checkpoint.metadata, checkpoint.warnings

    merged = {"format": "pt", "a": "first", "b": "other"}
    assert read({"format": "pt", "a": "first"}, {"format": "pt", "b": "other"}) == (merged, ())
    said = "two.safetensors: __metadata__ differs from that of an earlier file about a, format"
    assert read({"format": "pt", "a": "first"}, {"format": "np", "a": "second", "b": "other"}) == (merged, (said,))
    assert read(None, None) == ({}, ())


def test_texts_are_filed_under_the_module_whose_tensor_they_name(tmp_path):
    metadata = {"format": "pt", f"{QUERY}.weight": "one", f"{QUERY}.bias": "two", "": "three", ".": "four"}
    stored = StoredModules(open_checkpoint(describe(toy_checkpoint(tmp_path), metadata)))
    assert stored.metadata(QUERY) == {"weight": "one", "bias": "two"}
    assert stored.metadata(UP) == {}


def test_a_scheme_sees_what_is_said_about_its_layers_once_each_and_can_refuse(tmp_path, monkeypatch):
    """Also about a layer that is stored whole; never about layers that nobody describes, or that are not linear."""
    seen = []

    def look(self, described, stored, where):
        seen.append((dict(described), dict(stored), where))

    directory = toy_checkpoint(tmp_path, keep=("layers.1.mlp",))
    monkeypatch.setattr(ToyScheme, "check_metadata", look)
    plan(directory, platform="cpu", registry=toy_registry())
    assert seen == []
    describe(directory, {f"{QUERY}.weight": "int8", f"{UP}.weight": "whole", f"{NORM}.weight": "no linear layer"})
    plan(directory, platform="cpu", registry=toy_registry())
    assert seen == [
        ({"weight": "int8"}, {"codes": (32, 32), "scale": (32, 1), "bias": (32,)}, QUERY),
        ({"weight": "whole"}, {"weight": (48, 32)}, UP),
    ]

    def refuse(self, described, stored, where):
        raise ConfigError("QP-CFG-CONTRADICTION", where, f"says {described['weight']}")

    monkeypatch.setattr(ToyScheme, "check_metadata", refuse)
    with pytest.raises(ConfigError, match=f"{QUERY}: says int8") as caught:
        plan(directory, platform="cpu", registry=toy_registry())
    assert caught.value.code == "QP-CFG-CONTRADICTION"
