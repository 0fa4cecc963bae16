"""
Drafting with a next-N layer in FP8: two tokens a step while its configuration is kept, one when it is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from next_n import LAYERS, PREFIX, NextN, accept_length, config, fill, write_model
from safetensors.torch import load_file

import quantplug
from quantplug.draft import next_n_modules
from quantplug.errors import PlanError
from quantplug.inventory import architecture_of, inventory_of
from quantplug.load import load_layers
from quantplug.plan import Plan
from quantplug.plugins import registry
from quantplug.renames import NameMap, Rename
from quantplug.sharedexperts import with_shared_experts
from quantplug_transformers import from_pretrained

if TYPE_CHECKING:
    from pathlib import Path

FIRST = 3
NAMES = NameMap(
    (
        *(
            Rename(f"{PREFIX}.{part}", f"block.{part}", start=True)
            for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        ),
        Rename(PREFIX, "", start=True),
    )
)
"""From the files' names to those of the module in next_n.py."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write target and draft, everything but heads, embeddings and routers in FP8."""
    dense = write_model(tmp_path_factory.mktemp("dense"))
    directory = tmp_path_factory.mktemp("next_n") / "fp8"
    quantplug.convert(dense, directory, scheme="fp8", params={"strategy": "channel"})
    return directory


@pytest.fixture(scope="module")
def planned(checkpoint: Path) -> Plan:
    """Return one report of target and draft; the draft's modules are called as its engine has them."""
    found = registry()
    alone = quantplug.plan(checkpoint, platform="cpu", draft="next-n")
    assert alone.draft is not None
    files = quantplug.resolve_config(checkpoint, found)
    from quantplug.checkpoint import open_checkpoint
    from quantplug.config import read_model_config

    model_config = read_model_config(checkpoint)
    everything = inventory_of(open_checkpoint(checkpoint), model_config, found, files)
    rules = architecture_of(model_config, found)
    _, layer = next_n_modules(everything, model_config, rules)
    modules = with_shared_experts(layer, rules)
    return quantplug.plan(checkpoint, platform="cpu", draft=quantplug.Draft(inventory=modules, names=NAMES))


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> torch.nn.Module:
    return from_pretrained(checkpoint)


def dense_tensors(checkpoint: Path, planned: Plan) -> dict[str, torch.Tensor]:
    """Return what the draft keeps whole, by the names of its module."""
    assert planned.draft is not None
    stored = load_file(checkpoint / "model.safetensors")
    names = [name for layer in planned.draft.layers if not layer.quantized for name in layer.tensors]
    return {NAMES(name): stored[name] for name in names}


def test_the_draft_keeps_what_its_files_say_under_the_names_of_its_engine(planned: Plan) -> None:
    draft = planned.draft
    assert draft is not None
    assert draft.dialect == planned.dialect == "compressed-tensors"
    quantized = {layer.path for layer in draft.layers if layer.quantized}
    attention = {f"block.self_attn.{name}_proj" for name in "qkvo"}
    assert quantized == {"eh_proj", "block.mlp.experts", *attention}
    experts = draft.layer("block.mlp.experts")
    assert experts.problem is not None
    assert (experts.problem.experts, experts.problem.top_k) == (5, 3)
    assert [segment.name for segment in experts.segments[-3:]] == [
        f"{PREFIX}.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert not draft.layer("shared_head.head").quantized
    assert not any(layer.path.startswith(PREFIX) for layer in planned.layers)
    assert Plan.from_json(planned.to_json()) == planned


def test_it_drafts_right_with_its_configuration_and_wrong_without(
    checkpoint: Path, planned: Plan, target: torch.nn.Module
) -> None:
    assert planned.draft is not None
    loaded = load_layers(planned.draft, checkpoint)
    kept = fill(NextN(config()), dense_tensors(checkpoint, planned), {**loaded.modules, **loaded.experts})
    assert accept_length(target, kept, FIRST) == 2.0
    assert accept_length(target, without_scales(checkpoint, planned), FIRST) == 1.0


def test_dropping_the_configuration_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match=r"is to run dense, and 9 of its layers are stored quantized") as raised:
        quantplug.plan(checkpoint, platform="cpu", draft=quantplug.Draft(quantize="dense"))
    assert raised.value.code == "QP-PLAN-DRAFT"


def without_scales(checkpoint: Path, planned: Plan) -> NextN:
    """Return the draft of an engine that lost its configuration: codes are taken for weights."""
    stored = load_file(checkpoint / "model.safetensors")
    draft = NextN(config())
    state = dict(draft.named_parameters()) | dict(draft.named_buffers())
    experts = draft.block.mlp.experts
    with torch.no_grad():
        for name, tensor in dense_tensors(checkpoint, planned).items():
            state[name].copy_(tensor)
        for name, tensor in stored.items():
            if name.startswith(f"{PREFIX}.") and name.endswith(".weight") and NAMES(name) in state:
                state[NAMES(name)].copy_(tensor.to(torch.float32))
        for expert in range(4):
            gate, up, down = (
                stored[f"{PREFIX}.mlp.experts.{expert}.{name}.weight"].to(torch.float32)
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
            experts.down_proj[expert].copy_(down)
    return draft.eval()


def test_a_saved_target_still_has_its_draft(checkpoint: Path, target: torch.nn.Module, tmp_path: Path) -> None:
    target.save_pretrained(tmp_path)
    stored, saved = (load_file(directory / "model.safetensors") for directory in (checkpoint, tmp_path))
    assert saved.keys() == stored.keys()
    layer = [name for name in stored if name.startswith(f"{PREFIX}.")]
    assert layer
    assert all(torch.equal(saved[name], stored[name]) for name in layer)


def test_the_target_predicts_a_fixed_successor(target: torch.nn.Module) -> None:
    """What makes the figures above mean something: the tokens are not all the same."""
    ids = torch.arange(8)[:, None]
    assert len(set(target(ids).logits[:, -1].argmax(-1).tolist())) == 8
    assert len(target.model.layers) == LAYERS
