"""
A load that is decided: the plan, and everything needed to carry it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch

from quantplug.checkpoint import INDEX_FILE, open_checkpoint
from quantplug.config import resolve_config
from quantplug.detect import detect
from quantplug.inventory import architecture_of
from quantplug.onload import OnLoad, written_section
from quantplug.planner import plan as make_plan
from quantplug.plugins import registry as installed
from quantplug_transformers.devices import DeviceMap, platform_kind
from quantplug_transformers.experts import read_experts
from quantplug_transformers.fit import check_fit, in_model_paths
from quantplug_transformers.inventory import read_inventory
from quantplug_transformers.names import match_names, without_next_n

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from quantplug.jsonio import Json
    from quantplug.load import Progress
    from quantplug.plan import Plan
    from quantplug.policy import Policy
    from quantplug.registry import Registry


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller of a load asked for; the meaning of each is that of `quantplug.planner.plan`."""

    dtype: str | torch.dtype | None = None
    device_map: DeviceMap | None = None
    policy: Policy | None = None
    override: Mapping[str, Json] | None = None
    quantize: OnLoad | None = None
    strict: bool = False
    registry: Registry | None = None
    progress: Progress | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Request:
    """
    A decided load.

    Attributes:
        plan: with the paths of the model.
        directory: the checkpoint.
        weights_file: what Transformers is to read: the index, or the only file.
        section: how the checkpoint describes its quantization, or the one that is written for layers quantized on load;
            {} for a dense one.
        registry: the plugins the plan was made with.
        progress: told how far loading is.
    """

    plan: Plan
    directory: Path
    weights_file: str
    section: Mapping[str, Json]
    registry: Registry
    progress: Progress | None

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return itself: Transformers copies the configuration that carries it, and it never changes."""
        return self

    @property
    def quantized(self) -> frozenset[str]:
        """The paths of the layers that are replaced."""
        return frozenset(layer.path for layer in self.plan.layers if layer.quantized)


def make_request(model: PreTrainedModel, directory: Path, wishes: Wishes, plan: Plan | None = None) -> Request:
    """
    Plan a checkpoint for a model, or take a plan, and check that all three fit.

    Args:
        model: as its class builds it, on any device; only names and shapes are looked at.
        directory: the checkpoint.
        wishes: the caller's.
        plan: made before, from the same checkpoint; the wishes about planning are in it then.

    Raises:
        QuantplugError: as planning does, and as `check_fit` does.
    """
    registry = installed() if wishes.registry is None else wishes.registry
    checkpoint = open_checkpoint(directory)
    rules = architecture_of(model.config.to_dict(), registry)
    names = match_names(model, checkpoint.tensors, rules)
    names = without_next_n(names, checkpoint.tensors, model.config, rules.layers)
    if plan is None:
        plan = make_plan(
            directory,
            platform=detect(registry, platform_kind(wishes.device_map, registry)),
            probe=True,
            dtype=dtype_name(wishes.dtype),
            policy=wishes.policy,
            override=wishes.override,
            quantize=wishes.quantize,
            inventory=read_inventory(model, names, read_experts(model, names, checkpoint, rules), rules.routers),
            strict=wishes.strict,
            registry=registry,
        )
    else:
        plan = in_model_paths(plan, names)
    check_fit(model, plan, checkpoint, names)
    section: Mapping[str, Json]
    if any(segment.quantize for layer in plan.layers for segment in layer.segments):
        section = written_section(plan, registry)
    else:
        section = resolve_config(directory, registry, override=wishes.override).section
    weights_file = INDEX_FILE if (directory / INDEX_FILE).exists() else checkpoint.files[0]
    return Request(plan, directory, weights_file, section, registry, wishes.progress)


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Return the torch name of a dtype; None and "auto" leave it to the checkpoint."""
    if dtype is None or dtype == "auto":
        return None
    return str(dtype).removeprefix("torch.")
