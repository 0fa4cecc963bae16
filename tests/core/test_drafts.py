"""Drafts: their own files decide, nothing comes from the target, nothing that was found is lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from toy_checkpoints import dense_tensors, toy_checkpoint, toy_registry, toy_tensors, write_checkpoint

from quantplug.draft import Draft
from quantplug.errors import ConfigError, PlanError
from quantplug.load import load_layers
from quantplug.plan import Plan
from quantplug.planner import plan
from quantplug.renames import NameMap, Rename

if TYPE_CHECKING:
    from pathlib import Path

REGISTRY = toy_registry()
LAYERS = "model.layers"


def made(directory: Path, **arguments: object) -> Plan:
    return plan(directory, platform="cpu", registry=REGISTRY, **arguments)


def quantized(found: Plan | None) -> set[str]:
    assert found is not None
    return {layer.path for layer in found.layers if layer.quantized}


def with_next_n(directory: Path, **fields: object) -> Path:
    """Write a checkpoint of two layers of which the second is said to draft for the first."""
    toy_checkpoint(directory, **fields)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    return directory


def test_a_draft_in_a_directory_of_its_own_is_what_its_own_files_say(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "dense", dense_tensors())
    toy = toy_checkpoint(tmp_path / "toy", keep=("self_attn",))
    both = made(toy, draft=dense)
    assert quantized(both)
    assert not quantized(both.draft)
    assert both.draft == made(dense)
    other = made(dense, draft=toy)
    assert not quantized(other)
    assert other.draft == made(toy)
    assert other.draft.dialect == "toy"
    # What the caller says about the target is no word about the draft.
    wished = made(dense, draft=toy, quantize="toy", dtype="float16")
    assert (wished.dtype, wished.draft.dtype) == ("float16", "bfloat16")
    assert wished.draft == made(toy)


def test_one_report_and_one_hash_for_both(tmp_path: Path) -> None:
    toy = toy_checkpoint(tmp_path / "toy")
    alone, both = made(toy), made(toy, draft=toy)
    assert Plan.from_json(both.to_json()) == both
    assert both.hash != alone.hash == both.draft.hash


def test_a_wish_about_a_draft_must_be_said_about_it(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "dense", dense_tensors())
    toy = toy_checkpoint(tmp_path / "toy")
    assert quantized(made(toy, draft=Draft(dense, quantize="toy")).draft)
    assert not quantized(made(toy, draft=Draft(dense, quantize="dense")).draft)
    with pytest.raises(ConfigError, match="QP-CFG-OVERRIDE"):
        made(toy, draft=Draft(toy, override={"limit": 7, "quant_method": "other"}))
    # A list that is wrong about a dense layer may be left out of account; the layer runs as it is stored.
    mistaken = write_checkpoint(tmp_path / "mistaken", dense_tensors(), {"quant_method": "toy"})
    assert made(toy, draft=mistaken).draft.warnings
    assert not made(toy, draft=Draft(mistaken, quantize="dense")).draft.warnings


def test_a_draft_never_runs_at_another_precision_than_its_files_say(tmp_path: Path) -> None:
    toy = toy_checkpoint(tmp_path / "toy")
    with pytest.raises(PlanError, match=r"is to run dense, and 8 of its layers.*q_proj") as raised:
        made(toy, draft=Draft(toy, quantize="dense"))
    assert raised.value.code == "QP-PLAN-DRAFT"
    embedded = with_next_n(tmp_path / "embedded")
    with pytest.raises(PlanError, match=r"4 of its layers are stored quantized: model\.layers\.1\."):
        made(embedded, draft=Draft(quantize="dense"))


def test_next_n_layers_are_planned_apart_and_every_tensor_once(tmp_path: Path) -> None:
    directory = with_next_n(tmp_path, keep=("layers.1.mlp",))
    directory_plan = made(directory, draft="next-n")
    first = {f"{LAYERS}.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")}
    assert quantized(directory_plan) == first
    assert quantized(directory_plan.draft) == {f"{LAYERS}.1.self_attn.q_proj", f"{LAYERS}.1.self_attn.k_proj"}
    claimed = [
        name
        for found in (directory_plan, directory_plan.draft)
        for layer in found.layers
        for name in (*layer.tensors, *(name for segment in layer.segments for _, name in segment.tensors))
    ]
    assert sorted(claimed) == sorted(toy_tensors(("layers.1.mlp",)))
    assert not any("matches no module" in text for text in (*directory_plan.warnings, *directory_plan.draft.warnings))
    assert "shares the target's" in directory_plan.draft.warnings[-1]
    loaded = load_layers(directory_plan.draft, directory, registry=REGISTRY)
    assert loaded.modules.keys() == quantized(directory_plan.draft)


def test_rules_are_matched_by_the_names_of_the_files_whatever_the_engine_calls_the_modules(tmp_path: Path) -> None:
    directory = with_next_n(tmp_path, keep=("layers.1.mlp",))
    names = NameMap((Rename("model.layers.1", "draft.block", start=True),))
    found = made(directory, draft=Draft(names=names)).draft
    assert quantized(found) == {"draft.block.self_attn.q_proj", "draft.block.self_attn.k_proj"}
    assert not found.layer("draft.block.mlp.up_proj").quantized


def test_next_n_layers_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    toy = toy_checkpoint(tmp_path)
    with pytest.raises(PlanError, match="does not say num_hidden_layers"):
        made(toy, draft="next-n")
    path = toy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(PlanError, match="no layer from number 2 on"):
        made(toy, draft="next-n")


def test_a_dense_draft_keeps_its_bytes(tmp_path: Path) -> None:
    """Dropping a configuration on an explicit wish changes no stored number."""
    dense = write_checkpoint(tmp_path / "dense", dense_tensors(), {"quant_method": "toy"})
    found = made(dense, draft=Draft(dense, quantize="dense")).draft
    assert found.dialect == ""
    assert {name for layer in found.layers for name in layer.tensors} == set(dense_tensors())
