"""
Run every benchmark, one after the other: `python -m benchmarks`, or only those named: `python -m benchmarks planning`.
"""

from __future__ import annotations

import subprocess
import sys

SUBJECTS = (
    "discovery",
    "headers",
    "planning",
    "skip_matching",
    "loading",
    "converting",
    "cpu_linear",
    "cpu_formats",
    "cpu_moe",
    "decode",
)


def main(names: list[str]) -> int:
    """Run the named subjects, or all, each in a process of its own; return the number that failed."""
    unknown = [name for name in names if name not in SUBJECTS]
    if unknown:
        raise SystemExit(f"no benchmark named {unknown[0]}; there are {', '.join(SUBJECTS)}")
    failed = 0
    for name in names or SUBJECTS:
        print(f"\n== {name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
