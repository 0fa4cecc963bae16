"""
A directory that appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Self

from quantplug.errors import ConvertError

if TYPE_CHECKING:
    from types import TracebackType


class StagedDirectory:
    """
    Collects files in `NAME.partial` beside the destination and renames it when all went well.

    What an interrupted run left there is replaced by the next one; an existing destination is never touched.
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.path = destination.with_name(f"{destination.name}.partial")
        """Where to write meanwhile."""

    def __enter__(self) -> Self:
        if self._destination.exists():
            raise ConvertError(
                "QP-CONV-EXISTS",
                str(self._destination),
                "already exists",
                expected="a directory that does not exist yet",
                fix="Remove it, or name another destination.",
            )
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        _sync(self.path)
        self.path.rename(self._destination)
        _sync(self._destination.parent)


def _sync(directory: Path) -> None:
    """Make a directory's entries durable before anything relies on them."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
