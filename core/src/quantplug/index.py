"""
The index of a sharded checkpoint, and where a shard may lie: inside the checkpoint's directory, nowhere else.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError
from quantplug.files import FileAccessError, read_regular
from quantplug.jsontext import JsonTextError, decode_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json

SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 100_000_000

_MAX_VALUES = 2_000_000
_FIX = "Download the checkpoint again, or ask its maker for a correct index."
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Index:
    """
    What an index file says.

    Attributes:
        file: its name.
        weight_map: tensor name -> shard, relative to the directory.
        shards: the distinct shards, sorted.
        total_size: `metadata.total_size`, None when it is absent or not a number.
    """

    file: str
    weight_map: Mapping[str, str]
    shards: tuple[str, ...]
    total_size: float | None


def read_index(directory: Path, file: str) -> Index:
    """
    Read and check `model.safetensors.index.json`; no shard is touched.

    Raises:
        CheckpointError: `QP-ST-FILE`, `QP-ST-INDEX` or `QP-ST-PATH`.
    """
    path = directory / file
    refuse_escape(directory, file)
    try:
        value = decode_json(read_regular(path, MAX_INDEX_BYTES), max_values=_MAX_VALUES)
    except FileAccessError as fault:
        fix = fault.fix or _FIX
        raise CheckpointError("QP-ST-FILE", str(path), fault.what, expected="a regular file", fix=fix) from fault
    except JsonTextError as fault:
        raise CheckpointError("QP-ST-INDEX", str(path), fault.what, expected=fault.expected, fix=_FIX) from fault
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(weight_map, dict) or not weight_map:
        found = f"has the keys {sorted(value)!s:.200}" if isinstance(value, dict) else "is not an object"
        if isinstance(value, dict) and "weight_map" in value:
            found = "has a weight_map that is empty or not an object"
        raise CheckpointError(
            "QP-ST-INDEX", str(path), found, expected="an object with weight_map: {tensor name: shard file}", fix=_FIX
        )
    places: dict[str, str] = {}
    shards: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                "QP-ST-INDEX",
                f"{path}: weight_map",
                f"the shard of {name!r:.200} is {shard!r:.60}",
                expected="the name of a file",
                fix=_FIX,
            )
        places[name] = shard
        shards[shard] = name
    for shard, name in shards.items():
        _check_shard_name(f"{path}: weight_map of {name!r:.200}", shard)
        refuse_escape(directory, shard)
    return Index(file, places, tuple(sorted(shards, key=_by_number)), _total_size(value))


def _total_size(value: Mapping[str, Json]) -> float | None:
    metadata = value.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if isinstance(size, (int, float)) and not isinstance(size, bool) else None


def _by_number(shard: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,9})", shard)]


def _check_shard_name(where: str, shard: str) -> None:
    if not shard.endswith(SUFFIX) or shard.rpartition("/")[2] == SUFFIX:
        what = "is not a safetensors file"
    elif _CONTROL.search(shard):
        what = "has a control character in it"
    elif shard.startswith("/") or "\\" in shard or ":" in shard or PureWindowsPath(shard).drive:
        what = "is an absolute path, or one of another system"
    elif any(part in ("", ".", "..") for part in shard.split("/")):
        what = "leaves the checkpoint directory or is not in its shortest form"
    else:
        return
    raise CheckpointError(
        "QP-ST-PATH",
        where,
        f"the shard {shard[:200]!r} {what}",
        expected=f"the name of a {SUFFIX} file in the checkpoint directory",
        fix="Do not load this checkpoint; its index names files that are none of its own.",
    )


def refuse_escape(directory: Path, file: str) -> None:
    """
    Refuse a file whose symbolic links lead out of the checkpoint directory.

    The one exception is a snapshot in a Hugging Face cache, whose files are links to the blobs of the same repository
    (`models--X/blobs/…`), possibly on to the cache's shared store (`blobs/ab/abcd…`, named by content hash).

    Raises:
        CheckpointError: `QP-ST-PATH` naming where the link leads.
    """
    base = Path(os.path.realpath(directory))
    target = Path(os.path.realpath(base / file))
    if target.is_relative_to(base):
        return
    for snapshots in base.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            repository = snapshots.parent
            shared = repository.parent / "blobs"
            if target.is_relative_to(repository / "blobs") or (
                target.is_relative_to(shared) and _SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix())
            ):
                return
    raise CheckpointError(
        "QP-ST-PATH",
        str(directory / file),
        f"is a symbolic link that leads to {target}",
        expected="a file inside the checkpoint directory",
        fix="Copy the file into the directory, or pass the directory in which it really lies.",
    )
