"""
Reading tensors whose headers are already validated.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from typing import TYPE_CHECKING, Self

import torch

from quantplug.checkpoint import check_unchanged
from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    from types import TracebackType

    from quantplug.checkpoint import Checkpoint, TensorHeader


class TensorReader:
    """
    Reads tensors of one checkpoint by `pread`: a file that shrinks meanwhile is an error, not a dead process.

    The bytes go straight into the tensor, and other Python threads run meanwhile (safetensors' own reader holds them
    up, which costs a load a third of its time).

    A context manager; leaving it without an error checks that no file changed while it was open.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if error is None:
            check_unchanged(self._checkpoint)

    def read(self, name: str) -> torch.Tensor:
        """
        Return one tensor, fresh, on the CPU.

        Raises:
            CheckpointError: `QP-ST-MISSING` when there is no such tensor, `QP-ST-CHANGED` when the file no longer holds
                what its header said.
        """
        header = self._header(name)
        return self._read(header, header.shape, 0)

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """Return `tensor[index]` of a tensor with at least one axis, reading nothing else of it; raises as `read`."""
        header = self._header(name)
        return self._read(header, header.shape[1:], index * (header.nbytes // header.shape[0]))

    def _header(self, name: str) -> TensorHeader:
        header = self._checkpoint.tensors.get(name)
        if header is None:
            raise CheckpointError("QP-ST-MISSING", str(self._checkpoint.directory), f"has no tensor {name}")
        return header

    def _read(self, header: TensorHeader, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=getattr(torch, header.dtype))
        try:
            self._fill(raw_bytes(tensor), header, offset)
        except OSError as error:
            raise self._changed(header, error.strerror or str(error)) from error
        return tensor

    def _fill(self, target: memoryview, header: TensorHeader, offset: int) -> None:
        if header.file not in self._files:
            self._files[header.file] = os.open(self._checkpoint.directory / header.file, os.O_RDONLY | os.O_CLOEXEC)
        done, start = 0, header.start + offset
        while done < len(target):
            count = os.preadv(self._files[header.file], [target[done:]], start + done)
            if count == 0:
                raise self._changed(header, f"it ends at byte {start + done}")
            done += count

    def _changed(self, header: TensorHeader, what: str) -> CheckpointError:
        return CheckpointError(
            "QP-ST-CHANGED",
            f"{self._checkpoint.directory / header.file}: {header.name}",
            f"cannot be read as its header said: {what}",
            expected="a file that stays as it is while it is read",
            fix="Wait until whoever writes it is done, and load again.",
        )


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes without a copy; valid as long as the tensor is."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a contiguous CPU tensor's bytes, as hex."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
