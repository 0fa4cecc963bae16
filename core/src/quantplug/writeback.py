"""
Loaded layers in checkpoint form again: what was read, bit for bit, or what the kernels hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantplug.checkpoint import Checkpoint, open_checkpoint
from quantplug.errors import CheckpointError, LoadError
from quantplug.moemodules import QuantizedExperts
from quantplug.reader import TensorReader, digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from quantplug.modules import QuantizedLinear
    from quantplug.preparedmodule import SourceTensor


def stored_tensors(modules: Mapping[str, QuantizedLinear | QuantizedExperts]) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yield every stored tensor of loaded layers in checkpoint form, bit for bit; one layer, or expert, at a time.

    The bytes come from the source files as long as they are what was loaded, else from what the kernels hold. Layers
    that were quantized while they were loaded are yielded as a conversion would write them.

    Raises:
        LoadError: `QP-LOAD-SOURCE` when neither is possible.
    """
    opened: dict[str, Checkpoint] = {}
    for module in modules.values():
        if isinstance(module, QuantizedExperts):
            yield from _experts_from_source(module, opened) if module.sources else module.encode()
        else:
            yield from _from_source(module, opened) if module.sources else module.encode().items()


def _from_source(module: QuantizedLinear, opened: dict[str, Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        result = module.in_checkpoint_form({source.name: _again(source, opened) for source in module.sources})
    except CheckpointError as gone:
        try:
            result = module.encode()
        except LoadError as error:
            raise _neither(module.path, gone, error) from error
    yield from result.items()


def _experts_from_source(module: QuantizedExperts, opened: dict[str, Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        for source in module.sources:
            _again(source, opened)  # all of them first: either every byte is there, or none counts
    except CheckpointError as gone:
        try:
            yield from module.encode()
        except LoadError as error:
            raise _neither(module.path, gone, error) from error
        return
    for source in module.sources:
        yield from module.in_checkpoint_form({source.name: _again(source, opened)})


def _again(source: SourceTensor, opened: dict[str, Checkpoint]) -> torch.Tensor:
    """Read a tensor again; raises `CheckpointError` when its bytes are no longer what they were."""
    directory = str(Path(source.file).parent)
    if directory not in opened:
        opened[directory] = open_checkpoint(Path(directory))
    with TensorReader(opened[directory]) as reader:
        tensor = reader.read(source.name)
    if digest(tensor) != source.sha256:
        raise CheckpointError("QP-ST-CHANGED", f"{source.file}: {source.name}", "its bytes are others now")
    return tensor


def _neither(path: str, gone: CheckpointError, error: LoadError) -> LoadError:
    return LoadError(
        "QP-LOAD-SOURCE", path, f"{gone.where}: {gone.what}; and {error.what}",
        expected="the source file as it was loaded, or a kernel that can unprepare", fix=error.fix,
    )  # fmt: skip
