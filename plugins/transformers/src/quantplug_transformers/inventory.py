"""
The modules of a Transformers model as the core plans them, read off a model whose tensors need not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.expertnames import is_container
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.names import GENERIC
from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from quantplug.inventory import ModuleKind
    from quantplug_transformers.names import StoredNames


def read_inventory(
    model: PreTrainedModel,
    names: StoredNames,
    experts: Mapping[str, ModuleInfo] | None = None,
    routers: tuple[str, ...] = GENERIC.routers,
) -> Inventory:
    """
    Return every module that owns parameters or saved buffers, in model order.

    What Transformers builds by merging or splitting stored tensors is no linear layer here, as its loader does that to
    dense tensors only; experts are read by the core.

    Args:
        model: with its original modules, on any device.
        names: the correspondence of its names with those of the checkpoint.
        experts: its layers of experts, by path.
        routers: dotted suffixes of the modules that choose experts.
    """
    head = model.get_output_embeddings()
    tied = tied_modules(model)
    modules = []
    for path, module in model.named_modules():
        keys = list(owned_keys(path, module))
        if not keys:
            continue
        if experts and path in experts:
            modules.append(experts[path])
            continue
        kind = _kind(module, converted=not names.converted.isdisjoint(keys))
        linear = module if kind == "linear" and isinstance(module, torch.nn.Linear) else None
        shards = names.modules.get(path, ())
        modules.append(
            ModuleInfo(
                path=path,
                kind=kind,
                name=names.stored(path),
                class_name=type(module).__name__,
                shape=None if linear is None else LinearShape(linear.out_features, linear.in_features),
                bias=linear is not None and linear.bias is not None,
                shards=shards if len(shards) > 1 else (),
                tied_to=names.stored(tied[path]) if path in tied else "",
                head=module is head,
                router=linear is not None and is_container(names.stored(path), routers),
            )
        )
    return Inventory(tuple(modules), names.ignored)


def owned_keys(path: str, module: torch.nn.Module) -> Iterator[str]:
    """Yield the full names of a module's own parameters and saved buffers."""
    prefix = f"{path}." if path else ""
    transient = module._non_persistent_buffers_set
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name
    for name, _ in module.named_buffers(recurse=False):
        if name not in transient:
            yield prefix + name


def tied_modules(model: PreTrainedModel) -> Mapping[str, str]:
    """Return path of a module whose weight is tied -> path of the module that owns it."""
    pairs = model.all_tied_weights_keys.items()
    return {target.rpartition(".")[0]: source.rpartition(".")[0] for target, source in pairs}


def is_linear(module: torch.nn.Module) -> bool:
    """
    Whether a quantized layer may take a module's place.

    That includes subclasses of `torch.nn.Linear` that add no tensors: who quantized one took it for a linear layer.
    """
    return isinstance(module, torch.nn.Linear) and {"weight", "bias"}.issuperset(owned_keys("", module))


def _kind(module: torch.nn.Module, *, converted: bool) -> ModuleKind:
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "linear" if is_linear(module) and not converted else "other"
