"""
What a conversion does with each tensor of a dense checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.evidence import DENSE_SUFFIX
from quantplug.matcher import matches
from quantplug.skip import SchemeRef
from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantplug.checkpoint import Checkpoint
    from quantplug.inventory import Inventory, ModuleInfo
    from quantplug.jsonio import Json
    from quantplug.scheme import LinearScheme
    from quantplug.schemes import SchemeCache
    from quantplug.skip import Entry

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
        """Return what a linear module gets, or None when it stays dense."""
        params = self.head if module.head else self.params
        if params is None or any(matches(entry, module) for entry in self.skip):
            return None
        return SchemeRef(self.scheme, tuple(sorted(params.items())))


@dataclass(frozen=True, slots=True)
class Job:
    """
    One dense tensor and what becomes of it.

    Attributes:
        source: its name.
        module: checkpoint path of the module it is written for.
        outputs: tensors to write.
        scheme: the scheme that quantizes it, None for a plain copy.
        ref: that scheme's reference.
        nbytes: bytes to read.
    """

    source: str
    module: str
    outputs: tuple[Output, ...]
    scheme: LinearScheme | None
    ref: SchemeRef | None
    nbytes: int


def work_list(checkpoint: Checkpoint, inventory: Inventory, wish: Wish, schemes: SchemeCache) -> Iterator[Job]:
    """
    Yield the jobs of a conversion in file order; a tied head that is quantized comes last, from the embedding.

    Raises:
        ConfigError: `QP-CFG-FIELD` when the scheme cannot describe a layer; the layer is named.
    """
    modules = {module.name: module for module in inventory}
    for header in checkpoint.tensors.values():
        path, _, suffix = header.name.rpartition(".")
        module = modules.get(path)
        ref = None
        if module is not None and module.kind == "linear" and suffix == DENSE_SUFFIX:
            ref = wish.ref(module)
        if ref is None:
            copy = (header.name, header.dtype, header.shape)
            yield Job(header.name, path, (copy,), None, None, header.nbytes)
        else:
            yield _quantizing(header.name, path, header.shape, header.nbytes, ref, schemes)
    for module in inventory:
        stored = checkpoint.tensors.get(f"{module.tied_to}.{DENSE_SUFFIX}")
        ref = wish.ref(module) if module.tied_to and module.kind == "linear" else None
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
