"""
Whether a plan, a checkpoint and a model belong together, settled before a weight is read.

Transformers initialises at random what it does not find and only prints a table about it; here nothing is left over.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError, PlanError, list_names
from quantplug.moe import MoEProblem
from quantplug.spec import LinearProblem
from quantplug_transformers.experts import ExpertSizes, sizes_of, width
from quantplug_transformers.inventory import is_linear, owned_keys
from quantplug_transformers.trial import check_class

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from quantplug.checkpoint import Checkpoint
    from quantplug.expertrules import ExpertLayer
    from quantplug.plan import LayerPlan, Plan
    from quantplug_transformers.names import StoredNames


def in_model_paths(plan: Plan, names: StoredNames) -> Plan:
    """Return a plan whose layers are called as in the model, from one made with the stored names."""
    renamed = {stored[0]: path for path, stored in names.modules.items() if len(stored) == 1 and stored[0] != path}
    renamed |= {container: path for path, container in names.containers.items() if container != path}
    if renamed.keys().isdisjoint(layer.path for layer in plan.layers):
        return plan
    layers = tuple(replace(layer, path=renamed.get(layer.path, layer.path)) for layer in plan.layers)
    return replace(plan, layers=layers)


def check_fit(model: PreTrainedModel, plan: Plan, checkpoint: Checkpoint, names: StoredNames) -> None:
    """
    Check that every planned layer is in the model, and that every parameter has exactly one source.

    Args:
        model: with its original linear layers, on any device.
        plan: with the model's paths.
        checkpoint: the headers the plan was made from.
        names: the correspondence of both.

    Raises:
        PlanError: `QP-PLAN-MODEL` when a quantized layer is not a linear layer of that size in the model, or experts
            that compute something else.
        CheckpointError: `QP-ST-EXTRA` when the model has no place for a stored tensor, `QP-ST-SHAPE` when one has
            another shape, `QP-ST-MISSING` when a parameter is not stored.
    """
    quantized = {
        key for layer in plan.layers if layer.quantized for key in owned_keys(layer.path, _replaced(model, layer))
    }
    _check_dense(model, plan, checkpoint, names)
    missing = list(_missing(model, quantized, set(names.targets.values()) | names.converted))
    if missing:
        raise CheckpointError(
            "QP-ST-MISSING",
            str(checkpoint.directory),
            f"{len(missing)} parameter(s) of {type(model).__name__} are not stored: {list_names(missing)}",
            expected="a tensor for every parameter; nothing is initialised at random",
            fix="The checkpoint belongs to another model class, or is incomplete.",
        )


def _replaced(model: PreTrainedModel, layer: LayerPlan) -> torch.nn.Module:
    """Return the module of the model that a quantized layer replaces."""
    try:
        module = model.get_submodule(layer.path)
    except AttributeError:
        raise _unfit(layer, f"{type(model).__name__} has no such module") from None
    if isinstance(layer.problem, MoEProblem) and layer.experts is not None:
        _check_experts(model, module, layer, layer.problem, layer.experts)
    elif isinstance(layer.problem, LinearProblem):
        _check_linear(model, module, layer, layer.problem)
    return module


def _check_linear(model: PreTrainedModel, module: torch.nn.Module, layer: LayerPlan, problem: LinearProblem) -> None:
    if not isinstance(module, torch.nn.Linear) or not is_linear(module):
        raise _unfit(layer, f"it is a {type(module).__name__} in {type(model).__name__}")
    if (problem.out_features, problem.in_features) != (module.out_features, module.in_features):
        raise _unfit(
            layer,
            f"the file holds {problem.out_features} x {problem.in_features}",
            f"{module.out_features} x {module.in_features}, as {type(model).__name__} has it",
        )
    if module.bias is not None and not layer.tensors:
        raise CheckpointError(
            "QP-ST-MISSING", layer.path, "the model has a bias here and the checkpoint has none", expected="a bias"
        )


def _check_experts(
    model: PreTrainedModel, module: torch.nn.Module, layer: LayerPlan, problem: MoEProblem, experts: ExpertLayer
) -> None:
    sizes = sizes_of(module, width(model.config))
    if sizes is None:
        raise _unfit(layer, f"it is a {type(module).__name__} in {type(model).__name__}", "a module of stacked experts")
    stored = ExpertSizes(problem.experts, problem.hidden, problem.intermediate, problem.bias)
    if stored != sizes:
        raise _unfit(layer, f"the file holds {stored}", f"{sizes}, as {type(module).__name__} has it")
    check_class(layer.path, module, experts)


def _unfit(layer: LayerPlan, what: str, expected: str = "a torch.nn.Linear of the same size") -> PlanError:
    return PlanError(
        "QP-PLAN-MODEL",
        layer.path,
        f"is quantized ({layer.scheme}), but {what}",
        expected=expected,
        fix="Load it with the model class that its config.json names.",
    )


def _check_dense(model: PreTrainedModel, plan: Plan, checkpoint: Checkpoint, names: StoredNames) -> None:
    state = model.state_dict()
    ignored = frozenset(names.ignored)
    extra: list[str] = []
    for layer in plan.layers:
        for name in () if layer.quantized else layer.tensors:
            target = names.targets.get(name)
            if target is None:
                extra += [name] if name not in ignored else []
            elif target not in names.converted and checkpoint.tensors[name].shape != tuple(state[target].shape):
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{checkpoint.tensors[name].file}: {name}",
                    f"shape {list(checkpoint.tensors[name].shape)}",
                    expected=f"{list(state[target].shape)}, as {type(model).__name__} has it",
                    fix="The checkpoint belongs to another model, or its config.json to another checkpoint.",
                )
    if extra:
        raise CheckpointError(
            "QP-ST-EXTRA",
            str(checkpoint.directory),
            f"{len(extra)} tensor(s) have no place in {type(model).__name__}: {list_names(extra)}",
            expected="every tensor to be a parameter of the model, or part of a quantized linear layer",
            fix="Load it with the model class that its config.json names; a quantized module that is neither a linear "
            "layer nor routed experts is not served.",
        )


def _missing(model: PreTrainedModel, quantized: set[str], dense: set[str]) -> Iterator[str]:
    """Yield what is not stored; of tied parameters one is enough, and some a model can do without."""
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        group = groups.setdefault(source, {source})
        group.add(target)
        groups[target] = group
    for key in model.state_dict():
        stored = key in quantized or key in dense or not dense.isdisjoint(groups.get(key, ()))
        if not stored and not any(pattern.search(key) for pattern in optional):
            yield key
