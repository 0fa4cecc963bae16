"""
Shared experts as one more routed expert, for engines that run them so.

Files store a layer's shared expert beside the routed ones; an engine may append it to them, with a router that sends
every row there. What is stored, and how rules name it, stays the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError

if TYPE_CHECKING:
    from quantplug.inventory import Inventory
    from quantplug.names import Architecture


def with_shared_experts(inventory: Inventory, rules: Architecture) -> Inventory:
    """
    Return the modules of an engine that appends the shared expert of each layer to its routed ones.

    It becomes expert number E, and `top_k` grows by one. A layer without a shared expert stays as it is. Rules are
    asked about its projections by the names under which they are stored.

    Raises:
        ConfigError: `QP-CFG-REFUSED` when the routed experts of such a layer are stacked or joined in the files, or the
            family has none that are shared.
    """
    if not rules.experts.shared:
        raise ConfigError(
            "QP-CFG-REFUSED", rules.name, "has no shared experts that its rules know of", expected="a family that has",
            fix="Run the layers as they are stored.",
        )  # fmt: skip
    linear = {module.name: module for module in inventory if module.kind == "linear"}
    fused: dict[str, str] = {}
    modules = []
    for module in inventory:
        layer = module.experts
        shared = f"{module.name.rpartition('.')[0]}.{rules.experts.shared}"
        if layer is None or not any(name.startswith(f"{shared}.") for name in linear):
            modules.append(module)
            continue
        if layer.files.stacked or layer.files.joined:
            raise ConfigError(
                "QP-CFG-REFUSED", module.name, "its routed experts are stacked or joined, and its shared one is not",
                expected="experts stored one by one, gate and up apart", fix="Run the shared expert by itself.",
            )  # fmt: skip
        # Shared experts are ordinary linear layers in every family, whatever the routed ones are called.
        names = [f"{shared}.{name}" for name in _LINEAR if name != _GATE or layer.files.gate]
        fused |= dict.fromkeys(names, module.name)
        more = replace(layer, count=layer.count + 1, top_k=layer.top_k + 1)
        modules.append(replace(module, experts=more, shards=(*module.shards, *names)))
    return replace(inventory, modules=tuple(module for module in modules if module.name not in fused))


_GATE = "gate_proj"
_LINEAR = (_GATE, "up_proj", "down_proj")
"""Names of a shared expert's projections in the order of `ExpertFiles.projections`."""
