"""Shared experts as one more routed one: which projections, in which order, and what cannot be fused."""

from __future__ import annotations

import pytest

from quantplug.errors import ConfigError
from quantplug.expertrules import PER_EXPERT, W123, ExpertFiles, ExpertLayer, ExpertRules, joined, stacked
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.moe import ExpertFunction
from quantplug.names import Architecture
from quantplug.sharedexperts import with_shared_experts

RULES = Architecture("toy", ("toy",), experts=ExpertRules(shared="shared_experts"))
UNGATED = ExpertFiles(gate="")


def modules(files: ExpertFiles, *, shared: bool = True) -> Inventory:
    layer = ExpertLayer(2, 1, ExpertFunction(gated=files.gated), files)
    shards = tuple(f"mlp.experts.{expert}.{name}" for expert in range(2) for name in files.projections)
    names = [f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj") if shared]
    if not files.gated:
        names = [name for name in names if "gate" not in name]
    linear = [ModuleInfo(name, "linear") for name in names]
    return Inventory((ModuleInfo("mlp.experts", "experts", shards=shards, experts=layer), *linear))


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (PER_EXPERT, ("gate_proj", "up_proj", "down_proj")),
        (W123, ("gate_proj", "up_proj", "down_proj")),
        (UNGATED, ("up_proj", "down_proj")),
    ],
)
def test_it_is_the_last_expert_under_the_names_it_is_stored_by(files: ExpertFiles, names: tuple[str, ...]) -> None:
    [fused] = with_shared_experts(modules(files), RULES)
    assert fused.experts is not None
    assert (fused.experts.count, fused.experts.top_k) == (3, 2)
    assert fused.shards[-len(names) :] == tuple(f"mlp.shared_experts.{name}" for name in names)
    assert len(fused.shards) == 3 * len(names)


def test_a_layer_without_one_stays_as_it_is() -> None:
    alone = modules(PER_EXPERT, shared=False)
    assert with_shared_experts(alone, RULES) == alone


@pytest.mark.parametrize("files", [joined(), stacked()])
def test_experts_in_another_form_than_the_shared_one_are_refused(files: ExpertFiles) -> None:
    with pytest.raises(ConfigError, match=r"mlp\.experts.*stacked or joined") as raised:
        with_shared_experts(modules(files), RULES)
    assert raised.value.code == "QP-CFG-REFUSED"


def test_a_family_without_shared_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no shared experts that its rules know of"):
        with_shared_experts(modules(PER_EXPERT), Architecture("other"))
