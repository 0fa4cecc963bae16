"""
The routed experts of a Transformers model: which modules hold them, where a checkpoint stores them, what replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantplug.errors import PlanError
from quantplug.evidence import StoredModules
from quantplug.expertinventory import ExpertContainers
from quantplug.inventory import ModuleInfo
from quantplug.moemodules import QuantizedExperts

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from quantplug.checkpoint import Checkpoint
    from quantplug.expertrules import ExpertLayer
    from quantplug.names import Architecture
    from quantplug.plan import LayerPlan
    from quantplug_transformers.names import StoredNames

DOWN = "down_proj"
FIRST = ("gate_up_proj", "up_proj")
BIAS = "_bias"


class RoutedExperts(QuantizedExperts):
    """The experts of one layer, called as the blocks of Transformers call theirs."""

    def forward(  # type: ignore[override]  # Transformers passes the router's answers the other way round
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Return `[M, H]` for rows `[M, H]`.

        Args:
            hidden_states: the rows.
            top_k_index: `[M, T]`; an expert's number, or one past the last for none.
            top_k_weights: `[M, T]`, as the router gives them.
        """
        return super().forward(hidden_states, top_k_weights, top_k_index)


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """How many experts a module holds, and how large they are: E, H, I, and whether they have biases."""

    count: int
    hidden: int
    intermediate: int
    bias: bool

    def __str__(self) -> str:
        biases = "with" if self.bias else "without"
        return f"{self.count} experts [{self.intermediate}, {self.hidden}] {biases} biases"


def sizes_of(module: torch.nn.Module, hidden: int) -> ExpertSizes | None:
    """
    Return the sizes of a module that holds stacked experts; None for any other.

    Transformers keeps them as parameters `gate_up_proj` (or `up_proj`) and `down_proj` with the experts along the first
    axis, and in some families with biases; one expert is `[out, in]` or `[in, out]`, as the family likes it.

    Args:
        module: any module.
        hidden: the width of the model, which tells both sides of an expert apart.
    """
    own = dict(module.named_parameters(recurse=False))
    first = next((name for name in FIRST if name in own), "")
    known = {first, DOWN, first + BIAS, DOWN + BIAS}
    if not first or DOWN not in own or not known.issuperset(own) or own[DOWN].dim() != 3:
        return None
    count, *sides = own[DOWN].shape
    if hidden not in sides:
        return None
    sides.remove(hidden)
    return ExpertSizes(count, hidden, sides[0], DOWN + BIAS in own)


def width(config: Any) -> int:
    """Return the width of the hidden states of a model."""
    return int(config.get_text_config().hidden_size)


def read_experts(
    model: PreTrainedModel, names: StoredNames, checkpoint: Checkpoint, rules: Architecture
) -> Mapping[str, ModuleInfo]:
    """
    Return the layers of experts that a checkpoint stores by a declared rule, by path in the model.

    How many experts there are, and how many a row is sent to, is what the model's own configuration says, with the
    class' defaults; the sizes are those of its parameters.

    Args:
        model: with its original modules, on any device.
        names: the correspondence of names.
        checkpoint: the headers.
        rules: of the model's family.

    Raises:
        ConfigError: `QP-CFG-FIELD` when the configuration does not say what must be known.
        PlanError: `QP-PLAN-MODEL` when it contradicts the modules.
    """
    if not names.containers:
        return {}
    stored = ExpertContainers(StoredModules(checkpoint), rules.experts, model.config.to_dict())
    found = {}
    for path, container in names.containers.items():
        layer = stored.layer(container)
        module = model.get_submodule(path)
        sizes = sizes_of(module, width(model.config))
        if layer is None or sizes is None:
            continue
        _check_count(path, layer, sizes, module)
        layer = replace(layer, hidden=sizes.hidden, intermediate=sizes.intermediate)
        found[path] = ModuleInfo(
            path,
            "experts",
            name=container,
            class_name="Linear",  # what quantizers made of each projection, and name in their configurations
            bias=sizes.bias,
            shards=stored.shards(container, layer),
            experts=layer,
        )
    return found


def container_of(layer: LayerPlan) -> str:
    """Return the stored path that a planned layer of experts lies under."""
    path = layer.segments[0].name.rpartition(".")[0]
    return path if layer.experts is None or layer.experts.files.stacked else path.rpartition(".")[0]


def _check_count(path: str, layer: ExpertLayer, sizes: ExpertSizes, module: torch.nn.Module) -> None:
    if layer.count == sizes.count:
        return
    raise PlanError(
        "QP-PLAN-MODEL",
        path,
        f"{type(module).__name__} holds {sizes.count} experts, and the configuration names {layer.count}",
        expected="one number of experts",
        fix="Describe the family: a plugin's quantplug_architectures says which field counts the routed experts.",
    )
