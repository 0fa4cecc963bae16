"""
Compiled kernels on disk, so that a kernel is compiled once per machine and not once per process.

A file is named after what went into it: source, options and the compiler's version. It begins with a checksum of the
rest; one that does not match is compiled again and replaced. Files appear whole, by renaming, so several processes
may write the same one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug_marlin.compiler import Compiler

_CHECKSUM_BYTES = 32


def directory() -> Path:
    """Return where compiled kernels lie: `QUANTPLUG_CACHE`, else the user's cache directory."""
    named = os.environ.get("QUANTPLUG_CACHE")
    if named:
        return Path(named) / "marlin"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantplug" / "marlin"


def cubin(compiler: Compiler, source: str, options: Sequence[str], place: Path | None = None) -> bytes:
    """
    Return the machine code of a source, from disk where it is there and whole.

    A cache that cannot be read or written costs time, and nothing else.

    Args:
        compiler: what compiles it otherwise.
        source: CUDA C++.
        options: of the compiler.
        place: another directory than `directory()`.

    Raises:
        CompileError: the compiler refuses the source.
    """
    key = hashlib.sha256("\0".join([compiler.version, *options, source]).encode()).hexdigest()
    file = (place or directory()) / f"{key}.cubin"
    found = _read(file)
    if found is None:
        found = compiler.compile(source, options)
        _write(file, found)
    return found


def _read(file: Path) -> bytes | None:
    try:
        data = file.read_bytes()
    except OSError:
        return None
    checksum, code = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    return code if code and hashlib.sha256(code).digest() == checksum else None


def _write(file: Path, code: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    except OSError:
        return
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(code).digest() + code)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
