"""Runs a program that compiles kernels for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def compiled(program: str, which: str, directory: Path) -> list[str]:
    """
    Return the lines that a program prints, given one argument.

    It runs in a process of its own, for the interpreter, once chosen, is there for good.
    """
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Sums are fused with products where Triton does so by itself; it warns that this will change.
    surroundings |= {"TRITON_CACHE_DIR": str(directory / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    written = directory / "program.py"
    written.write_text(program)
    done = subprocess.run(
        [sys.executable, str(written), which], env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
