"""
The headers of a checkpoint: every tensor's name, dtype, shape and place, and nothing read but headers.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError, list_names
from quantplug.files import FileStamp
from quantplug.header import TensorHeader, read_header
from quantplug.index import SUFFIX, read_index, refuse_escape

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from quantplug.header import FileHeader
    from quantplug.index import Index

__all__ = ["Checkpoint", "FileStamp", "TensorHeader", "check_unchanged", "open_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    The validated headers of a checkpoint directory.

    Attributes:
        directory: where it lies.
        tensors: by name, in file order.
        files: the safetensors files that belong to it, in order.
        metadata: `__metadata__` of all files; where they differ about a key, the first counts and a warning says so.
        warnings: harmless oddities (an index whose total_size is wrong, a safetensors file nobody names).
        stamps: what each of `files` looked like when its header was read.
    """

    directory: Path
    tensors: Mapping[str, TensorHeader]
    files: tuple[str, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    stamps: Mapping[str, FileStamp] = field(default_factory=dict)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """
    Read and check every header of a checkpoint; reads no tensor data.

    The checkpoint is `model.safetensors`; or what `model.safetensors.index.json` names; or, without either, the only
    safetensors file in the directory. Others that lie beside are not part of it, and a warning names them.

    Raises:
        CheckpointError: `QP-ST-FILE` when there is no checkpoint, else `QP-ST-…` naming file, tensor and byte.
    """
    directory = Path(directory)
    try:
        present = sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(SUFFIX))
    except OSError as error:
        what = {FileNotFoundError: "does not exist", NotADirectoryError: "is not a directory"}.get(type(error))
        raise CheckpointError(
            "QP-ST-FILE",
            str(directory),
            what or f"cannot be listed: {error.strerror or error}",
            expected="the directory of a checkpoint",
        ) from error
    index = _index_of(directory, present)
    if index is not None:
        files = index.shards
    elif SINGLE_FILE in present:
        files = (SINGLE_FILE,)
    elif len(present) == 1:
        files = (present[0],)
    else:
        raise _no_checkpoint(directory, present)
    headers: dict[str, FileHeader] = {}
    for file in files:
        refuse_escape(directory, file)
        headers[file] = read_header(directory / file, file)
    tensors = _join(directory, headers)
    warnings = [] if index is None else _check_index(directory, index, headers, tensors)
    metadata, differing = _merge_metadata(headers)
    warnings += differing
    beside = [name for name in present if name not in headers]
    if beside:
        warnings.append(f"{list_names(beside)} in {directory}: not part of the checkpoint, not read")
    return Checkpoint(
        directory=directory,
        tensors=tensors,
        files=files,
        metadata=metadata,
        warnings=tuple(warnings),
        stamps={file: header.stamp for file, header in headers.items()},
    )


def check_unchanged(checkpoint: Checkpoint) -> None:
    """
    Compare every file with what it looked like when its header was read.

    Raises:
        CheckpointError: `QP-ST-CHANGED` naming the first file that is gone, replaced, or was written to.
    """
    for file, stamp in checkpoint.stamps.items():
        path = checkpoint.directory / file
        try:
            now = FileStamp.of(path.stat())
        except OSError as error:
            what = f"can no longer be read: {error.strerror or error}"
        else:
            if now == stamp:
                continue
            if (now.inode, now.device) != (stamp.inode, stamp.device):
                what = "was replaced by another file"
            elif now.size != stamp.size:
                what = f"had {stamp.size} bytes and now has {now.size}"
            else:
                what = "was written to"
        raise CheckpointError(
            "QP-ST-CHANGED",
            str(path),
            f"{what} since its header was read",
            expected="a file that stays as it is while it is read",
            fix="Wait until whoever writes it is done, and load again.",
        )


def _index_of(directory: Path, present: list[str]) -> Index | None:
    path = directory / INDEX_FILE
    if not (path.exists() or path.is_symlink()):
        return None
    index = read_index(directory, INDEX_FILE)
    if SINGLE_FILE in present and SINGLE_FILE not in index.shards:
        # Readers disagree about which one counts, so the same directory would give two different models.
        raise CheckpointError(
            "QP-ST-INDEX",
            str(directory),
            f"holds {SINGLE_FILE}, and {INDEX_FILE} that names {list_names(index.shards)} instead",
            expected="one of the two",
            fix="Move away the one that is left over from another save.",
        )
    return index


def _no_checkpoint(directory: Path, present: list[str]) -> CheckpointError:
    return CheckpointError(
        "QP-ST-FILE",
        str(directory),
        f"holds several safetensors files and no index: {list_names(present)}" if present else "holds no safetensors",
        expected=f"{SINGLE_FILE}, {INDEX_FILE} with its shards, or a single {SUFFIX} file",
        fix="Pass the directory of the checkpoint itself"
        + ("." if present else "; pickled weights (.bin, .pt) are never read: convert them with their own framework."),
    )


def _join(directory: Path, headers: Mapping[str, FileHeader]) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for header in headers.values():
        for tensor in header.tensors:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    "QP-ST-INDEX",
                    f"{directory}: {tensor.name}",
                    f"lies in {other.file} and in {tensor.file}",
                    expected="every tensor in one file",
                    fix="The shards come from different saves, or from a faulty tool; download all of them again.",
                )
    _refuse_twins(directory, tensors)
    return tensors


def _merge_metadata(headers: Mapping[str, FileHeader]) -> tuple[dict[str, str], list[str]]:
    """Return what the files say about themselves, and a warning for each that contradicts one before it."""
    merged: dict[str, str] = {}
    warnings = []
    for file, header in headers.items():
        other = [key for key, text in header.metadata.items() if merged.setdefault(key, text) != text]
        if other:
            warnings.append(f"{file}: __metadata__ differs from that of an earlier file about {list_names(other)}")
    return merged, warnings


def _refuse_twins(directory: Path, names: Collection[str]) -> None:
    """Refuse names that differ in their bytes and look the same: file systems and people take them for one."""
    others = [name for name in names if not name.isascii()]
    if not others:
        return
    by_form = {name: name for name in names if name.isascii()}
    for name in others:
        other = by_form.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise CheckpointError(
                "QP-ST-NAME",
                f"{directory}: tensor {name!r}",
                f"is the same text as {other!a}, spelled with other characters ({name!a})",
                expected="names that differ when normalised to Unicode NFC",
            )


def _check_index(
    directory: Path, index: Index, headers: Mapping[str, FileHeader], tensors: Mapping[str, TensorHeader]
) -> list[str]:
    where = str(directory / index.file)
    fix = "Index and shards come from different saves; download all of them again."
    lacking = [name for name in index.weight_map if name not in tensors]
    if lacking:
        raise CheckpointError(
            "QP-ST-INDEX",
            where,
            f"{len(lacking)} tensor(s) are not in the shards it names: "
            + list_names([f"{name} ({index.weight_map[name]})" for name in lacking]),
            expected="every tensor of weight_map in its shard",
            fix=fix,
        )
    astray = [name for name, shard in index.weight_map.items() if tensors[name].file != shard]
    if astray:
        raise CheckpointError(
            "QP-ST-INDEX",
            where,
            f"{len(astray)} tensor(s) lie in another shard: "
            + list_names([f"{name} (in {tensors[name].file}, not {index.weight_map[name]})" for name in astray]),
            expected="every tensor of weight_map in its shard",
            fix=fix,
        )
    warnings = []
    unlisted = [name for name in tensors if name not in index.weight_map]
    if unlisted:
        warnings.append(f"{where}: {len(unlisted)} tensor(s) of its shards are not listed: {list_names(unlisted)}")
    size = sum(tensor.nbytes for tensor in tensors.values())
    if index.total_size is not None and index.total_size != size:
        warnings.append(f"{where}: total_size says {index.total_size}, the tensors have {size} bytes")
    return warnings
