"""
Reading tensors whose headers are already validated.
"""

from __future__ import annotations

import ctypes
import hashlib
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from quantplug.checkpoint import check_unchanged
from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    from types import TracebackType

    from quantplug.checkpoint import Checkpoint


class TensorReader:
    """
    Reads tensors of one checkpoint through `pread`: a file that shrinks meanwhile is an error, not a dead process.

    A context manager; leaving it without an error checks that no file changed while it was open.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
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
        header = self._checkpoint.tensors.get(name)
        if header is None:
            raise CheckpointError("QP-ST-MISSING", str(self._checkpoint.directory), f"has no tensor {name}")
        try:
            if header.file not in self._files:
                path = self._checkpoint.directory / header.file
                self._files[header.file] = safe_open(path, framework="pt", backend="pread").__enter__()
            tensor: torch.Tensor = self._files[header.file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._changed(header.file, name, str(error)) from error
        if tuple(tensor.shape) != header.shape or str(tensor.dtype).removeprefix("torch.") != header.dtype:
            raise self._changed(header.file, name, f"it now is {tensor.dtype} {list(tensor.shape)}")
        return tensor

    def _changed(self, file: str, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            "QP-ST-CHANGED",
            f"{self._checkpoint.directory / file}: {name}",
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
