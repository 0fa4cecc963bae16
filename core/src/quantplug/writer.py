"""
Writing a safetensors file whose tensors arrive one at a time, in any order.

The header is known before the first tensor is, so memory never holds more than the tensor at hand.
"""

from __future__ import annotations

import json
import os
from math import prod
from typing import TYPE_CHECKING, BinaryIO, Self

import torch

from quantplug.errors import ConvertError
from quantplug.ledger import Ledger
from quantplug.reader import raw_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

# torch dtype name -> the format's name, for every dtype that a checkpoint we write can hold
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_ALIGNMENT = 64


class TensorFileWriter:
    """
    One safetensors file, laid out up front from names, dtypes and shapes.

    A context manager: leaving it without an error checks that every tensor was written, and syncs the file.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """
        Lay the file out.

        Args:
            path: file to create; must not exist.
            tensors: (name, torch dtype name, shape) in the order in which they will lie.
            metadata: the file's `__metadata__`.
        """
        self._path = path
        self._ledger = Ledger()
        self._places: dict[str, tuple[int, str]] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        position = 0
        for name, dtype, shape in tensors:
            size = prod(shape) * getattr(torch, dtype).itemsize
            header[name] = {
                "dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, position + size]
            }  # fmt: skip
            self._places[name] = (position, dtype)
            self._ledger.expect(name, shape)
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Padding with spaces is part of the format; it puts the data on a cache line for whoever maps the file.
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._prefix = len(text).to_bytes(8, "little") + text
        self._file: BinaryIO | None = None
        self.size = len(self._prefix) + position
        """Bytes the file will have."""

    def __enter__(self) -> Self:
        self._file = self._path.open("xb")
        try:
            self._file.write(self._prefix)
            self._file.truncate(self.size)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if error is None:
                self._ledger.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """
        Write one tensor to its place.

        Raises:
            ConvertError: `QP-CONV-VALUE` when its dtype or shape is not what was announced.
            LoadError: `QP-LOAD-OVERLAP` when it was written before.
        """
        position, dtype = self._places[name]
        if str(tensor.dtype) != f"torch.{dtype}" or self._file is None:
            raise ConvertError("QP-CONV-VALUE", name, f"became {tensor.dtype}", expected=dtype)
        self._ledger.write(name, tuple((0, size) for size in tensor.shape))
        self._file.seek(len(self._prefix) + position)
        self._file.write(raw_bytes(tensor.contiguous()))
