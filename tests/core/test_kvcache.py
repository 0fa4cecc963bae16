"""Scales of a cache of keys and values: recognised, accounted for, handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from toy_checkpoints import toy_registry, toy_tensors, write_checkpoint

from quantplug.errors import CheckpointError
from quantplug.kvcache import is_kv_scale
from quantplug.load import load_layers
from quantplug.plan import KVCachePlan, Plan
from quantplug.planner import plan

if TYPE_CHECKING:
    from pathlib import Path

REGISTRY = toy_registry()
ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    "suffix", ["k_scale", "v_scale", "kv_scale", "attn.k_scale", "k_proj.k_scale", "v_proj.output_scale", "q_scale"]
)
def test_every_spelling_is_handed_over_as_stored(tmp_path: Path, suffix: str) -> None:
    name = f"{ATTENTION}.{suffix}"
    tensors = toy_tensors() | {name: torch.tensor([0.125])}
    directory = write_checkpoint(tmp_path, tensors, {"quant_method": "toy"})
    made = plan(directory, platform="cpu", registry=REGISTRY)
    assert made.kv_cache == KVCachePlan(None, (name,))
    assert Plan.from_json(made.to_json()) == made
    loaded = load_layers(made, directory, registry=REGISTRY)
    assert loaded.kv_scales.keys() == {name}
    assert torch.equal(loaded.kv_scales[name], torch.tensor([0.125]))


@pytest.mark.parametrize(
    "name", [f"{ATTENTION}.k_proj.scale", f"{ATTENTION}.o_proj.output_scale", "scale", f"{ATTENTION}.k_scales"]
)
def test_other_scales_are_not_taken_for_them(name: str) -> None:
    assert not is_kv_scale(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_would_spoil_the_cache_is_refused_by_name(tmp_path: Path, value: float) -> None:
    name = f"{ATTENTION}.k_scale"
    directory = write_checkpoint(tmp_path, toy_tensors() | {name: torch.tensor(value)}, {"quant_method": "toy"})
    made = plan(directory, platform="cpu", registry=REGISTRY)
    with pytest.raises(CheckpointError, match=r"self_attn\.k_scale") as raised:
        load_layers(made, directory, registry=REGISTRY)
    assert raised.value.code == "QP-ST-SCALE"


def test_a_checkpoint_without_them_hands_nothing_over(tmp_path: Path) -> None:
    made = plan(write_checkpoint(tmp_path, toy_tensors(), {"quant_method": "toy"}), platform="cpu", registry=REGISTRY)
    assert made.kv_cache is None
