"""
What a conversion does with each tensor of a dense checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError, list_names
from quantplug.evidence import BIAS_SUFFIX, DENSE_SUFFIX
from quantplug.expertnames import one_expert
from quantplug.expertspecs import row_halves
from quantplug.inventory import ModuleInfo
from quantplug.matcher import matches
from quantplug.skip import SCHEMED, SchemeRef
from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantplug.checkpoint import Checkpoint, TensorHeader
    from quantplug.expertrules import Ending, ExpertLayer
    from quantplug.inventory import Inventory
    from quantplug.jsonio import Json
    from quantplug.scheme import LinearScheme
    from quantplug.schemes import SchemeCache
    from quantplug.skip import Entry

_APART = ("gate_proj", "up_proj")
"""What the halves of a joined projection are called when they are written apart."""

Output = tuple[str, str, tuple[int, ...]]
"""Name, torch dtype name and shape of one tensor to be written."""


@dataclass(frozen=True, slots=True)
class Wish:
    """
    What the caller of a conversion wants.

    Attributes:
        scheme: name of the scheme to write.
        params: its parameters.
        head: parameters for the output head, or None to leave it dense.
        skip: layers to leave whole.
    """

    scheme: str
    params: Mapping[str, Json]
    head: Mapping[str, Json] | None
    skip: tuple[Entry, ...]

    def ref(self, module: ModuleInfo) -> SchemeRef | None:
        """Return what a linear module, or experts, get; None when they stay dense, as routers always do."""
        params = self.head if module.head else self.params
        if params is None or module.router or any(matches(entry, module) for entry in self.skip):
            return None
        if module.experts is not None:
            self._refuse_some(module)
        return SchemeRef(self.scheme, tuple(sorted(params.items())))

    def _refuse_some(self, module: ModuleInfo) -> None:
        """Raise `ConfigError` (`QP-SKIP-SHARDS`) where entries name some experts of a layer and not others."""
        parts = [ModuleInfo(shard, module.kind, class_name=module.class_name) for shard in module.shards]
        some = [part.name for part in parts if any(matches(entry, part) for entry in self.skip)]
        if some:
            raise ConfigError(
                "QP-SKIP-SHARDS",
                module.path,
                f"{len(some)} of its {len(parts)} projections are to be skipped: {list_names(some)}",
                expected="every projection of every expert quantized, or none",
                fix=f"Skip all of them: skip=[{module.name!r}].",
            )


@dataclass(frozen=True, slots=True)
class Part:
    """
    The share of a stacked tensor that one job is about.

    Attributes:
        expert: number of the expert.
        ending: how the tensor is stored.
        rows: which rows of the share.
    """

    expert: int
    ending: Ending
    rows: slice


@dataclass(frozen=True, slots=True)
class Job:
    """
    One dense tensor, or a part of one, and what becomes of it.

    Attributes:
        source: its name.
        module: checkpoint path of the module it is written for.
        outputs: tensors to write.
        scheme: the scheme that quantizes it, None for a plain copy.
        ref: that scheme's reference.
        nbytes: bytes to read.
        part: what of a stacked tensor it is about; None for all of a tensor.
    """

    source: str
    module: str
    outputs: tuple[Output, ...]
    scheme: LinearScheme | None
    ref: SchemeRef | None
    nbytes: int
    part: Part | None = None


def work_list(checkpoint: Checkpoint, inventory: Inventory, wish: Wish, schemes: SchemeCache) -> Iterator[Job]:
    """
    Yield the jobs of a conversion in file order; a tied head that is quantized comes last, from the embedding.

    Raises:
        ConfigError: `QP-CFG-FIELD` when the scheme cannot describe a layer; the layer is named.
    """
    modules = {module.name: module for module in inventory}
    modules |= {shard: module for module in inventory if module.experts is not None for shard in module.shards}
    wished = {module.path: wish.ref(module) for module in inventory if module.kind in SCHEMED}
    for header in checkpoint.tensors.values():
        path, _, suffix = header.name.rpartition(".")
        module = modules.get(path)
        ref = None if module is None else wished.get(module.path)
        if ref is not None and module is not None and module.experts is not None and module.experts.files.stacked:
            yield from _stacked(header, module, module.experts, ref, schemes)
        elif ref is not None and suffix == DENSE_SUFFIX:
            yield _quantizing(header.name, path, header.shape, header.nbytes, ref, schemes)
        else:
            copy = (header.name, header.dtype, header.shape)
            yield Job(header.name, path, (copy,), None, None, header.nbytes)
    for module in inventory:
        stored = checkpoint.tensors.get(f"{module.tied_to}.{DENSE_SUFFIX}")
        ref = wished.get(module.path) if module.tied_to else None
        if ref is not None and stored is not None and f"{module.name}.{DENSE_SUFFIX}" not in checkpoint.tensors:
            yield _quantizing(stored.name, module.name, stored.shape, stored.nbytes, ref, schemes)


def _quantizing(
    source: str, module: str, shape: tuple[int, ...], nbytes: int, ref: SchemeRef, schemes: SchemeCache
) -> Job:
    scheme = schemes.get(ref, module)
    outputs = tuple(
        (f"{module}.{spec.suffix}", spec.dtypes[0], spec.shape)
        for spec in scheme.written(LinearShape(shape[0], shape[1]))
    )
    return Job(source, module, outputs, scheme, ref, nbytes)


def _stacked(
    header: TensorHeader, module: ModuleInfo, layer: ExpertLayer, ref: SchemeRef, schemes: SchemeCache
) -> Iterator[Job]:
    """
    Yield the jobs of a stacked tensor: for every expert its own tensors, gate and up apart.

    That is how quantization tools write such models, and what every reader of theirs knows.
    """
    projection, ending = layer.files.stacked_names[header.name.rpartition(".")[2]]
    shape = one_expert(header, ending).shape
    halves: dict[str, slice] = {projection: slice(None)}
    if projection == layer.files.joined:
        halves = dict(zip(_APART, row_halves(shape[0], layer.files.order), strict=True))
    nbytes = header.nbytes // (layer.count * len(halves))
    for expert in range(layer.count):
        for name, rows in halves.items():
            path, size = f"{module.name}.{expert}.{name}", (len(range(*rows.indices(shape[0]))), *shape[1:])
            part = Part(expert, ending, rows)
            if ending.suffix == BIAS_SUFFIX:
                copy = (f"{path}.{BIAS_SUFFIX}", header.dtype, size)
                yield Job(header.name, path, (copy,), None, None, nbytes, part)
            else:
                yield replace(_quantizing(header.name, path, size, nbytes, ref, schemes), part=part)
