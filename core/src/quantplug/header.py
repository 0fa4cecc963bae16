"""
The header of one safetensors file, read and checked by our own parser.

A second validator beside the safetensors package: it refuses everything that package refuses, and also what that
package lets through (a name twice, names that are not printable, sizes no machine has), and its messages name file,
tensor and byte. The rules are those of the safetensors README, section "Format".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError
from quantplug.files import FileAccessError, FileStamp, open_regular, read_exactly
from quantplug.jsontext import JsonTextError, decode_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from quantplug.jsonio import Json

MAX_HEADER_BYTES = 100_000_000
"""Largest header; the safetensors package has the same limit."""
MAX_TENSORS = 262_144
"""Most tensors in one file."""
MAX_DIMS = 8
MAX_DIM = 1 << 48
"""Sizes stay below this."""
MAX_NUMEL = 1 << 47
"""Numbers of elements stay below this, so that no product with a width in bits overflows 64 bits."""
MAX_NAME_BYTES = 1024

_LENGTH_BYTES = 8
# Per tensor: three opening brackets, and commas between tensors, fields, sizes and offsets; as much again for metadata.
_MAX_VALUES = 2 * MAX_TENSORS * (3 + 4 + MAX_DIMS)
_KEYS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "U16": ("uint16", 16),
    "U32": ("uint32", 32),
    "U64": ("uint64", 64),
    "I8": ("int8", 8),
    "I16": ("int16", 16),
    "I32": ("int32", 32),
    "I64": ("int64", 64),
    "F4": ("float4_e2m1fn_x2", 4),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}
"""safetensors dtype -> (torch name, bits per element). F4 shapes count elements, of which torch packs two in one."""

# Characters that move the cursor, reorder what is printed around them, or end a line.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_TRUNCATED = "The file is cut short; download or copy it again."


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
class FileHeader:
    """
    The validated header of one file.

    Attributes:
        tensors: in the order of their data.
        metadata: its `__metadata__`, empty when there is none.
        stamp: what the file looked like.
    """

    tensors: tuple[TensorHeader, ...]
    metadata: Mapping[str, str]
    stamp: FileStamp


def read_header(path: Path, file: str) -> FileHeader:
    """
    Read and check the header of one safetensors file; no tensor data is read.

    Args:
        path: where it lies.
        file: its name within the checkpoint directory, for the tensors to carry.

    Raises:
        CheckpointError: `QP-ST-FILE`, `QP-ST-HEADER`, `QP-ST-NAME`, `QP-ST-DTYPE`, `QP-ST-SHAPE` or `QP-ST-LAYOUT`.
    """
    try:
        with open_regular(path) as (handle, stamp):
            length = _header_length(path, read_exactly(handle, _LENGTH_BYTES), stamp.size)
            data = read_exactly(handle, length)
    except FileAccessError as fault:
        fix = fault.fix or "Download the checkpoint again."
        raise CheckpointError("QP-ST-FILE", str(path), fault.what, expected="a safetensors file", fix=fix) from fault
    except OSError as error:
        raise CheckpointError("QP-ST-FILE", str(path), f"cannot be read: {error.strerror or error}") from error
    if len(data) != length:
        raise CheckpointError("QP-ST-CHANGED", str(path), "shrank while its header was read", fix=_TRUNCATED)
    table = _parse(path, data)
    metadata = _metadata(path, table.pop(_METADATA, {}))
    base = _LENGTH_BYTES + length
    tensors = [_tensor(path, file, base, name, entry) for name, entry in table.items()]
    tensors.sort(key=attrgetter("start", "end"))
    _check_layout(path, base, stamp.size, tensors)
    return FileHeader(tuple(tensors), metadata, stamp)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointError(
            "QP-ST-HEADER",
            str(path),
            f"has {size} bytes",
            expected="8 bytes of header length, a JSON header and the data",
            fix=_TRUNCATED,
        )
    length = int.from_bytes(prefix, "little")
    where, what = f"{path}: byte 0", f"the header length is {length}"
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            "QP-ST-HEADER",
            where,
            what,
            expected=f"at most {MAX_HEADER_BYTES}",
            fix="This is not a safetensors file, or it is damaged.",
        )
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(
            "QP-ST-HEADER",
            where,
            what,
            expected=f"at most {size - _LENGTH_BYTES}, since the file has {size} bytes",
            fix=_TRUNCATED,
        )
    return length


def _parse(path: Path, data: bytes) -> dict[str, Json]:
    where = f"{path}: header (byte 8 to {_LENGTH_BYTES + len(data)})"
    if not data.startswith(b"{"):
        begin = f"begins with 0x{data[0]:02X}" if data else "is empty"
        raise CheckpointError("QP-ST-HEADER", where, begin, expected="a JSON object, beginning with {")
    # Counted before parsing, so that a header of a million entries costs nothing.
    entries = data.count(b'"data_offsets"')
    if entries > MAX_TENSORS:
        raise _too_many(where, entries)
    try:
        table = decode_json(data, max_values=_MAX_VALUES)
    except JsonTextError as fault:
        code = "QP-ST-NAME" if fault.kind == "duplicate" else "QP-ST-HEADER"
        raise CheckpointError(code, where, fault.what, expected=fault.expected, fix=_damaged()) from fault
    if not isinstance(table, dict):
        raise CheckpointError("QP-ST-HEADER", where, "is not an object", expected="a JSON object")
    if len(table) > MAX_TENSORS + 1:
        raise _too_many(where, len(table))
    return table


def _too_many(where: str, count: int) -> CheckpointError:
    return CheckpointError(
        "QP-ST-HEADER", where, f"describes {count} tensors", expected=f"at most {MAX_TENSORS} in one file"
    )


def _damaged() -> str:
    return "The file is damaged or was written by a faulty tool; download it again or ask its maker."


def _metadata(path: Path, value: Json) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, text in value.items() if isinstance(value, dict) else [(_METADATA, value)]:
        if not isinstance(value, dict) or not isinstance(text, str):
            raise CheckpointError(
                "QP-ST-HEADER",
                f"{path}: {_METADATA}",
                f"{key!r:.80} is {_kind(text)}",
                expected="an object whose values are strings",
                fix=_damaged(),
            )
        texts[key] = text
    return texts


def _tensor(path: Path, file: str, base: int, name: str, entry: Json) -> TensorHeader:
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME_BYTES and ".." not in name):
        _check_name(path, name)
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        found = f"the fields {sorted(entry)!s:.120}" if isinstance(entry, dict) else _kind(entry)
        raise _malformed(path, name, f"has {found}", "an object with exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise CheckpointError(
            "QP-ST-DTYPE",
            f"{path}: {name}",
            f"dtype {dtype!r:.80} is not one that torch can hold",
            expected=f"one of {', '.join(DTYPES)}",
            fix="A newer quantplug may know it; otherwise the file is damaged.",
        )
    torch_name, bits = known
    sizes = _sizes(path, name, shape)
    numel = prod(sizes)
    if numel >= MAX_NUMEL:
        raise _oversized(path, name, f"shape {shape} has {numel} elements", f"fewer than {MAX_NUMEL}")
    if not (
        isinstance(offsets, list)
        and len(offsets) == 2
        and type(start := offsets[0]) is int
        and type(end := offsets[1]) is int
        and 0 <= start <= end
    ):
        raise _malformed(
            path, name, f"data_offsets is {offsets!r:.80}", "[start, end], integers with 0 <= start <= end"
        )
    if (end - start) * 8 != numel * bits:
        raise CheckpointError(
            "QP-ST-SHAPE",
            f"{path}: {name}",
            f"{end - start} bytes at data_offsets {offsets}",
            expected=f"{numel * bits / 8:.10g} bytes for shape {shape} of {dtype}",
            fix=_damaged(),
        )
    return TensorHeader(name, torch_name, sizes, file, base + start, base + end)


def _sizes(path: Path, name: str, shape: Json) -> tuple[int, ...]:
    if not isinstance(shape, list):
        raise _malformed(path, name, f"shape is {_kind(shape)}", "a list of integers")
    if len(shape) > MAX_DIMS:
        raise _oversized(path, name, f"shape has {len(shape)} dimensions", f"at most {MAX_DIMS}")
    sizes: list[int] = []
    for size in shape:
        if type(size) is not int:
            raise _malformed(path, name, f"shape {shape} has {_kind(size)} in it", "a list of integers")
        if not 0 <= size < MAX_DIM:
            raise _oversized(path, name, f"shape {shape} has the size {size}", f"0 to {MAX_DIM - 1}")
        sizes.append(size)
    return tuple(sizes)


def _check_name(path: Path, name: str) -> None:
    if not name:
        what = "is empty"
    elif len(name.encode()) > MAX_NAME_BYTES:
        what = f"has {len(name.encode())} bytes"
    elif (found := _UNPRINTABLE.search(name)) is not None:
        what = f"has the control character U+{ord(found[0]):04X} at position {found.start()}"
    elif ".." in re.split(r"[/\\]", name):
        what = "has a path component '..'"
    else:
        return
    raise CheckpointError(
        "QP-ST-NAME",
        f"{path}: tensor {name[:80]!r}",
        f"its name {what}",
        expected=f"1 to {MAX_NAME_BYTES} bytes of printable text without '..' components",
        fix=_damaged(),
    )


def _check_layout(path: Path, base: int, size: int, tensors: list[TensorHeader]) -> None:
    position, before = base, "the header"
    for tensor in tensors:
        if tensor.start != position:
            overlaps = tensor.start < position
            raise CheckpointError(
                "QP-ST-LAYOUT",
                f"{path}: {tensor.name}",
                f"its data begin at byte {tensor.start}, {'inside' if overlaps else 'after a hole behind'} {before}",
                expected=f"byte {position}: tensors follow each other without overlap or hole",
                fix=_damaged(),
            )
        position, before = tensor.end, tensor.name
    if position != size:
        raise CheckpointError(
            "QP-ST-LAYOUT",
            str(path),
            f"has {size} bytes, {abs(size - position)} {'too few' if size < position else 'too many'}",
            expected=f"{position} bytes, the end of {before}",
            fix=_TRUNCATED if size < position else _damaged(),
        )


def _malformed(path: Path, name: str, what: str, expected: str) -> CheckpointError:
    return CheckpointError("QP-ST-HEADER", f"{path}: {name}", what, expected=expected, fix=_damaged())


def _oversized(path: Path, name: str, what: str, expected: str) -> CheckpointError:
    return CheckpointError("QP-ST-SHAPE", f"{path}: {name}", what, expected=expected, fix=_damaged())


def _kind(value: Json) -> str:
    match value:
        case None:
            return "null"
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return repr(value)[:40]
