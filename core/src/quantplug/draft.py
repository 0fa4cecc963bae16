"""
Models that draft tokens for another one: whose files decide about them, and which modules they are.

A draft is resolved from the configuration of the directory that its tensors lie in, like any model. Nothing comes from
the target, and nothing that its own files say is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantplug.errors import PlanError, list_names
from quantplug.inventory import Inventory
from quantplug.sections import CONFIG_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.checkpoint import Checkpoint
    from quantplug.jsonio import Json
    from quantplug.names import Architecture
    from quantplug.onload import OnLoad
    from quantplug.plan import Plan
    from quantplug.renames import NameMap

DENSE_WISH = "dense"
"""What `Draft.quantize` says to run a draft without its quantization."""

NEXT_N = "next-n"
"""What stands for the next-N layers in a target's own files, where a draft is named by a text."""

_LAYERS = "num_hidden_layers"


@dataclass(frozen=True, slots=True)
class Draft:
    """
    A draft model, and what the caller wishes of it.

    Attributes:
        source: its directory or repository id; None for the next-N layers that lie in the target's own files.
        dtype: torch name of its activation dtype; None takes the one that its config.json names.
        override: quantization fields the caller states about it; they may add to its files, never contradict them.
        quantize: the wish to quantize its dense weights while they are loaded; or "dense", to leave its configuration
            out of account, which is an error where its files hold quantized weights. None keeps what its files say.
        inventory: its modules as the engine runs them; None takes them from the tensor names.
        names: from module paths in its files to those of the engine; rules are matched under the files' names.
    """

    source: str | Path | None = None
    dtype: str | None = None
    override: Mapping[str, Json] | None = None
    quantize: OnLoad | str | None = None
    inventory: Inventory | None = None
    names: NameMap | None = None

    @property
    def recipe(self) -> OnLoad | str | None:
        """The wish to quantize it, if that is what `quantize` says."""
        return None if self.quantize == DENSE_WISH else self.quantize


def next_n_modules(
    inventory: Inventory, model_config: Mapping[str, Json], rules: Architecture
) -> tuple[Inventory, Inventory]:
    """
    Return the modules of a model without its next-N layers, and those of the layers.

    Raises:
        PlanError: `QP-PLAN-DRAFT` when the files hold no such layers.
    """
    first = number_of_layers(model_config)
    if first is None:
        raise PlanError(
            "QP-PLAN-DRAFT", "draft", f"{CONFIG_FILE} does not say {_LAYERS}",
            expected="the number of the target's layers",
            fix="Without it next-N layers cannot be told from the model's own.",
        )  # fmt: skip
    within = [module for module in inventory if layer_number(module.name, rules.layers) >= first]
    if not within:
        raise PlanError(
            "QP-PLAN-DRAFT",
            "draft",
            f"the files hold no layer from number {first} on under {' or '.join(rules.layers)}",
            expected=f"next-N layers behind the {first} of {CONFIG_FILE}",
            fix="Name the directory of the draft model.",
        )
    inside = {module.path for module in within}
    return replace(inventory, modules=tuple(m for m in inventory if m.path not in inside)), Inventory(tuple(within))


def renamed(inventory: Inventory, names: NameMap | None) -> Inventory:
    """Return modules under the paths that an engine has for them; the names that rules are matched by stay."""
    if names is None:
        return inventory
    return replace(inventory, modules=tuple(replace(m, path=names(m.path), name=m.name) for m in inventory))


def refuse_lost_codes(kept: Plan, where: str) -> None:
    """
    Check that a draft which is to run dense is stored dense.

    Args:
        kept: its plan by its own configuration.
        where: what it is, for messages.

    Raises:
        PlanError: `QP-PLAN-DRAFT` naming the layers that are stored quantized.
    """
    found = [layer.path for layer in kept.layers if layer.quantized]
    if found:
        raise PlanError(
            "QP-PLAN-DRAFT",
            where,
            f"is to run dense, and {len(found)} of its layers are stored quantized: {list_names(found)}",
            expected="a draft that runs at the precision of its files",
            fix="Leave the wish out, and what the files say is kept; or name a draft that is stored dense.",
        )


def shared_with_target(inventory: Inventory) -> tuple[str, ...]:
    """Return remarks about what a draft does not store and an engine takes from the target."""
    kinds = {module.kind for module in inventory}
    notes = [] if "embedding" in kinds else ["the draft stores no embedding: the engine shares the target's"]
    if not any(module.head for module in inventory):
        notes.append("the draft stores no output head: the engine shares the target's")
    return tuple(notes)


def tensors_of(checkpoint: Checkpoint, inventory: Inventory) -> frozenset[str]:
    """Return the names of the stored tensors that belong to these modules."""
    owners = {name for module in inventory for name in (module.name, *module.shards)}
    return frozenset(name for name in checkpoint.tensors if name.rpartition(".")[0] in owners)


def number_of_layers(model_config: Mapping[str, Json]) -> int | None:
    """Return how many layers config.json says that a model has, None where it does not."""
    for part in (model_config, model_config.get("text_config")):
        count = part.get(_LAYERS) if isinstance(part, Mapping) else None
        if isinstance(count, int) and not isinstance(count, bool):
            return count
    return None


def layer_number(name: str, prefixes: tuple[str, ...]) -> int:
    """Return the number of the layer that a module or tensor lies in, -1 where it lies in none."""
    for prefix in prefixes:
        number, _, _ = name.removeprefix(f"{prefix}.").partition(".")
        if name.startswith(f"{prefix}.") and number.isascii() and number.isdecimal():
            return int(number)
    return -1
