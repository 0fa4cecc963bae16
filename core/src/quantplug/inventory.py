"""
The modules a plan is about: read off a model on the meta device by an adapter, or off the tensor names of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from collections.abc import Iterator

ModuleKind = Literal["linear", "embedding", "other"]


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """
    One module of a model.

    Attributes:
        path: module path in the engine that will run it ("model.layers.0.mlp.gate_up_proj").
        kind: what it is; only "linear" is ever given a linear scheme.
        name: its path in checkpoint names, where matching happens; the same as `path` unless the engine renames.
        class_name: class of the module ("Linear"), for entries that name classes.
        shape: logical size of a linear module when known (from a model), else None (then the format tells).
        bias: whether a linear module has a bias.
        shards: checkpoint paths that are fused into this module, in output order; () when it is stored under `name`.
        tied_to: path of the module that owns this one's weight, or "".
    """

    path: str
    kind: ModuleKind
    name: str = ""
    class_name: str = ""
    shape: LinearShape | None = None
    bias: bool = False
    shards: tuple[str, ...] = ()
    tied_to: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.path)


@dataclass(frozen=True, slots=True)
class Inventory:
    """All modules of one model that own tensors, in model order."""

    modules: tuple[ModuleInfo, ...]

    def __iter__(self) -> Iterator[ModuleInfo]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)
