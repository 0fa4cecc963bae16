"""
NVIDIA's compute-sanitizer over our own kernels: `python -m tests.device.sanitize [KERNEL …] [--tool TOOL …]`.

Each tool watches each kernel in a process of its own, several at a time, with torch's caching allocator off: every
tensor is an allocation of exactly its size, so that one byte read behind it is seen. Each tool must also find the fault
that is planted for it. Ends with 0 where it does and finds no other. The kernels without a fault only tell what
racecheck can be asked about.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.device.planted import FAULTLESS, TOOLS

from quantplug.plugins import registry

OURS = ("quantplug-marlin", "quantplug-triton", "quantplug-cublas")
PLANTED = "planted"
FOUND = 86
"""What the sanitizer ends with where it found something."""
SHOWN = "1000"
"""Findings that it prints: of those beyond, nothing tells which layer they belong to."""


class Run(NamedTuple):
    """
    One tool over one kernel.

    Attributes:
        tool: of the sanitizer.
        kernel: its name; "planted" is the fault that the tool must find, and `FAULTLESS` are those that have none.
    """

    tool: str
    kernel: str

    @property
    def name(self) -> str:
        """What it is called in the table and on disk."""
        return f"{self.tool}-{self.kernel}"

    @property
    def command(self) -> list[str]:
        """What is watched."""
        if self.kernel in {PLANTED, *FAULTLESS}:
            return ["tests.device.planted", self.tool if self.kernel == PLANTED else self.kernel]
        return ["tests.device.launches", self.kernel, self.tool]

    def is_right(self, code: int | None) -> bool:
        """Whether it should end with that code, None if it was cut short."""
        if self.kernel in FAULTLESS:
            return code in {0, FOUND}
        return code == (FOUND if self.kernel == PLANTED else 0)


def kernels() -> list[str]:
    """Return the names of our own kernels; those that the core derives launch the same."""
    found = registry()
    provided = {**found.kernels, **found.moe_kernels}
    return [
        name
        for name, each in provided.items()
        if each.plugin in OURS and not name.startswith("loop.") and not name.endswith(".dense")
    ]


def watch(run: Run, sanitizer: str, logs: Path, limit: float) -> tuple[bool, str]:
    """Return whether a run ended as it should, and what it said last."""
    command = [sanitizer, "--tool", run.tool, "--error-exitcode", str(FOUND), "--print-limit", SHOWN]
    began, log = time.perf_counter(), logs / f"{run.name}.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*command, sys.executable, "-m", *run.command],
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the sanitizer, and what it watches
            code = None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    took = f"{time.perf_counter() - began:.0f} s, {'cut short' if code is None else f'ended with {code}'}"
    return run.is_right(code), f"{lines[-1] if lines else 'nothing'} ({took})"


def main() -> int:
    """Watch all that is asked for, and print a line for each."""
    parser = argparse.ArgumentParser(description="compute-sanitizer over our GPU kernels")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="names; all of our own when left out")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="memcheck and racecheck when left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one process may take")
    parser.add_argument("--logs", type=Path, default=Path(".cache/sanitizer"), help="folder that all output goes to")
    asked = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print(
            "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin: it comes with NVIDIA's CUDA toolkit"
        )
        return 2
    asked.logs.mkdir(parents=True, exist_ok=True)
    watched = [PLANTED, *(asked.kernels or kernels())]
    runs = [Run(tool, kernel) for tool in asked.tool or TOOLS[:2] for kernel in watched]
    if any(run.tool == "racecheck" for run in runs):
        runs += [Run("racecheck", kernel) for kernel in FAULTLESS]
    right = True
    with ThreadPoolExecutor(asked.jobs) as pool:
        results = pool.map(lambda run: watch(run, sanitizer, asked.logs, asked.limit), runs)
        for run, (ended_well, said) in zip(runs, results, strict=True):
            right &= ended_well
            print(f"{'ok  ' if ended_well else 'BAD '} {run.name:32} {said}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
