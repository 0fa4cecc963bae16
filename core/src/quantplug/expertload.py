"""
Loading the experts of one layer: one expert after the other is read, decoded in other threads, and prepared.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

from quantplug.evidence import BIAS_SUFFIX
from quantplug.moescheme import share
from quantplug.preparedmodule import SourceTensor
from quantplug.reader import digest, raw_bytes
from quantplug.workers import Workers, worker_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from quantplug.checkpoint import Checkpoint
    from quantplug.expertrules import Ending
    from quantplug.expertweights import ExpertWeights
    from quantplug.ledger import Ledger
    from quantplug.moemodules import QuantizedExperts
    from quantplug.plan import LayerPlan
    from quantplug.reader import TensorReader


def load_experts(
    layer: LayerPlan,
    module: QuantizedExperts,
    checkpoint: Checkpoint,
    reader: TensorReader,
    ledger: Ledger,
    device: torch.device,
    progress: Callable[[int], None],
) -> None:
    """
    Fill a module from the files. In memory are one expert, or several that are small together, and what is prepared.

    Where there are weights already, every expert is read and decoded once before any is overwritten.

    Args:
        layer: its plan.
        module: what is to be filled.
        checkpoint: the files.
        reader: reads them.
        ledger: is told of every tensor that is used.
        device: where the experts will run.
        progress: told the bytes of each expert that was read.

    Raises:
        CheckpointError, LoadError: as `load_layers`.
    """
    if module.prepared:
        for _ in _Stream(layer, module, reader, ledger).experts(lambda _: None):
            pass
    streams: list[_Stream] = []

    def experts() -> Iterator[ExpertWeights]:
        streams.append(_Stream(layer, module, reader, ledger))
        # For a second layout they are read again.
        return streams[-1].experts(progress if len(streams) == 1 else lambda _: None)

    module.install(experts, device=device)
    module.sources = tuple(
        SourceTensor(str(checkpoint.directory / checkpoint.tensors[name].file), name, text)
        for name, text in streams[-1].digests().items()
    )


class _Stream:
    """The experts of a layer out of its files."""

    def __init__(self, layer: LayerPlan, module: QuantizedExperts, reader: TensorReader, ledger: Ledger) -> None:
        self._module = module
        self._reader = reader
        self._ledger = ledger
        self._path = layer.path
        files = module.files
        count = len(files.projections)
        biases = layer.tensors or (None,) * len(layer.segments)
        self._names = [
            [*segment.tensors, *([] if bias is None else [(BIAS_SUFFIX, bias)])]
            for segment, bias in zip(layer.segments, biases, strict=True)
        ]
        self._count = count
        self._stacked = files.stacked
        self._endings: dict[str, Ending] = {ending.suffix: ending for ending in files.endings} if files.stacked else {}
        self._whole: dict[str, str] = {}
        self._growing: dict[str, hashlib._Hash] = {}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every tensor that was read, by name."""
        return self._whole | {name: growing.hexdigest() for name, growing in self._growing.items()}

    def experts(self, progress: Callable[[int], None]) -> Iterator[ExpertWeights]:
        """Yield the experts in the order of their numbers; the next ones are decoded meanwhile."""
        workers: Workers[ExpertWeights] = Workers(worker_count())
        with workers:
            for expert in range(self._module.problem.experts):
                stored = self._read(expert)
                size = sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
                progress(size)
                held = size + self._module.codes_per_expert
                yield from workers.make_room(held)
                workers.give(held, partial(self._module.decode, expert, stored))
                del stored
            yield from workers.rest()

    def _read(self, expert: int) -> list[dict[str, torch.Tensor]]:
        if self._stacked:
            return [{suffix: self._part(name, suffix, expert) for suffix, name in names} for names in self._names]
        mine = self._names[expert * self._count : (expert + 1) * self._count]
        return [{suffix: self._tensor(name) for suffix, name in names} for names in mine]

    def _tensor(self, name: str) -> torch.Tensor:
        self._ledger.claim(name, self._path)
        tensor = self._reader.read(name)
        self._whole[name] = digest(tensor)
        return tensor

    def _part(self, name: str, suffix: str, expert: int) -> torch.Tensor:
        if self._endings[suffix].common:
            return self._tensor(name)
        self._ledger.claim(name, self._path)
        part = self._reader.read_part(name, expert)
        # Experts follow each other in the file, so that the parts' bytes are the whole's.
        self._growing.setdefault(name, hashlib.sha256()).update(raw_bytes(part))
        return share(part, self._endings[suffix])
