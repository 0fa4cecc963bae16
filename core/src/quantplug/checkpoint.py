"""
The headers of a checkpoint: every tensor's name, dtype, shape and place, and nothing read but headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """
    One stored tensor.

    Attributes:
        name: full tensor name.
        dtype: torch dtype name ("int32", "bfloat16", "float8_e4m3fn").
        shape: stored shape.
        file: file name within the checkpoint directory.
        start: absolute byte offset of the data in the file.
        end: one past the last byte.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    The validated headers of a checkpoint directory.

    Attributes:
        directory: where it lies.
        tensors: by name, in file order.
        files: the safetensors files that belong to it, in order.
        metadata: `__metadata__` of the first file that has any.
        warnings: harmless oddities (an index whose total_size is wrong, a safetensors file nobody names).

    """

    directory: Path
    tensors: Mapping[str, TensorHeader]
    files: tuple[str, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...] = ()
