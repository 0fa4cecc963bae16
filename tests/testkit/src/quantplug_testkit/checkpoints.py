"""
Checkpoints written byte by byte, whole or broken in one place; nothing but the standard library.

The writer shares nothing with what reads: it knows the safetensors layout (8 bytes of length, a JSON header, the data)
and lets a test lie about every part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Stored = tuple[str, Sequence[int], bytes]
"""One tensor: safetensors dtype, shape, bytes."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype that torch can hold, by its safetensors name."""


def filled(dtype: str, shape: Sequence[int], byte: int = 0) -> Stored:
    """Return a tensor all of whose bytes are the same."""
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    return dtype, tuple(shape), bytes([byte]) * (bits // 8)


def header_of(tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the header as an object: the tensors one after the other, in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header


def safetensors_bytes(
    tensors: Mapping[str, Stored],
    *,
    metadata: Mapping[str, str] | None = None,
    edit: Callable[[dict[str, Any]], None] | None = None,
    header: bytes | None = None,
    length: int | None = None,
    tail: bytes = b"",
) -> bytes:
    """
    Return the bytes of a safetensors file.

    Args:
        tensors: by name, in file order.
        metadata: the `__metadata__` object.
        edit: changes the header object before it is written.
        header: written instead of the header, as it is.
        length: written instead of the header's length.
        tail: bytes after the data.
    """
    if header is None:
        table = header_of(tensors, metadata)
        if edit is not None:
            edit(table)
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    return prefix + header + b"".join(data for _, _, data in tensors.values()) + tail


def index_of(shards: Mapping[str, Mapping[str, Stored]]) -> dict[str, Any]:
    """Return the right index of these shards (`{file: tensors}`)."""
    size = sum(len(data) for tensors in shards.values() for _, _, data in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Stored] | None = None,
    *,
    shards: Mapping[str, Mapping[str, Stored]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """
    Write a whole checkpoint: `model.safetensors`, or shards with their index, and config.json unless that is None.

    Args:
        directory: made if need be.
        tensors: of `model.safetensors`.
        shards: `{file: tensors}`.
        config: content of config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    if shards is not None:
        for file, part in shards.items():
            (directory / file).write_bytes(safetensors_bytes(part))
        (directory / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def fingerprint(directory: Path) -> dict[str, str]:
    """Return what every entry below a directory is: the hash of its bytes, the target of a link, or its kind."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.fspath(path.readlink())}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = oct(path.stat().st_mode)
    return found
