"""
Opening files that nobody vouches for: only regular files, never a wait, never more than was asked for.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

# A FIFO without a writer would block `open`, a terminal could become ours; neither flag exists on Windows.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """
    What a file looked like when it was opened; another stamp later means another file.

    Attributes:
        size: bytes.
        mtime_ns: time of the last change of its contents, in nanoseconds.
        inode: number within its file system.
        device: the file system.
    """

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Return the stamp in a `stat` result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


class FileAccessError(Exception):
    """
    A file cannot be opened, is not a regular file or is too large; callers add code and place.

    Attributes:
        what: what was found.
        fix: what to do, or "".
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, FileStamp]]:
    """
    Open a regular file for reading and say what it looks like; a symbolic link is followed.

    Raises:
        FileAccessError: when there is no such file, it is not a regular one, or the system refuses.
    """
    try:
        # Looked at before it is opened: opening a device can already have an effect.
        _refuse_special(path.stat())
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise _fault(path, error) from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        _refuse_special(status)
        yield file, FileStamp.of(status)


def read_regular(path: Path, limit: int) -> bytes:
    """
    Return the bytes of a regular file of at most `limit` bytes.

    Raises:
        FileAccessError: as `open_regular`, and when the file is larger.
    """
    with open_regular(path) as (file, stamp):
        if stamp.size > limit:
            raise FileAccessError(f"{stamp.size} bytes are more than the {limit} allowed")
        try:
            data = read_exactly(file, stamp.size)
        except OSError as error:
            raise _fault(path, error) from error
    if len(data) != stamp.size:
        raise FileAccessError(f"it shrank from {stamp.size} to {len(data)} bytes while it was read")
    return data


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Return the next `count` bytes, fewer only at the end of the file."""
    parts = []
    while count > 0:
        # The system may hand over less than was asked for, and never more than 2 GiB at once.
        part = file.read(min(count, 1 << 30))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refuse_special(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "a special file")
        raise FileAccessError(f"is {kind}, not a regular file")


def _fault(path: Path, error: OSError) -> FileAccessError:
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return FileAccessError(
                f"is a symbolic link to {os.fspath(path.readlink())}, which does not exist",
                "Download the file again, or copy the directory with the files its links point to.",
            )
        return FileAccessError("does not exist")
    return FileAccessError(f"cannot be read: {error.strerror or error}")
