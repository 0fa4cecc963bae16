"""
Linear layers on a GPU, beside peers in the same run: `python -m benchmarks.gpu [--quick] [--only …] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.gpu.cases import FORMATS, QUICK_ROWS, QUICK_SHAPES, ROWS, SHAPES, Case
from benchmarks.gpu.checking import check_all
from benchmarks.gpu.contenders import ours
from benchmarks.gpu.measuring import ceilings, measure
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.table import HEADER, compact, everyone, row, summary
from benchmarks.gpu.timing import COLD_BYTES


def main() -> None:
    """Check everyone, measure everyone, print the tables; write JSON where asked to."""
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU: torch.cuda.is_available() is False here")
    started = time.monotonic()
    rows = tuple(options.rows or (QUICK_ROWS if options.quick else ROWS))
    shapes = QUICK_SHAPES if options.quick else SHAPES
    mine = [contender.name for contender in ours()]
    pairs = [(name, kind) for kind in FORMATS for name in mine if _wanted(f"{name}/{kind}", options.only)]
    formats = [kind for kind in FORMATS if any(kind == wanted for _, wanted in pairs)]
    peers = [maker() for maker in PEERS]
    cases = [Case(kind, *shape) for kind in formats for shape in shapes]
    tasks = [(name, case) for case in cases for name, kind in pairs if kind == case.format]
    tasks += [(peer.name, case) for case in cases for peer in peers if peer.concerns(case)]
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        checked = check_all(tasks, rows, Path(folder))
        refusals = (f"not run: {r.name} for {r.case.format}: {r.refused}" for r in checked if r.refused)
        print(*dict.fromkeys(refusals), sep="\n")
        ready = time.monotonic()
        limits = ceilings()
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {limits.read / 1e12:.2f} TB/s, does "
            f"{limits.bf16 / 1e12:.0f} TFLOP/s in bf16 and {limits.fp8 / 1e12:.0f} in FP8; cold over {COLD_BYTES} bytes"
        )
        counted = [peer.name for peer in peers if not peer.informative]
        names = list(dict.fromkeys(name for name, _ in pairs))
        points = []
        print(*HEADER, sep="\n")
        for point in measure(sorted(checked, key=lambda r: cases.index(r.case)), rows, limits, Path(folder)):
            points.append(point)
            print(row(point, names, counted), flush=True)
    print("", *everyone(points, [*names, *(peer.name for peer in peers)]), sep="\n")
    print("", *compact(points, names, counted), sep="\n")
    print("", *summary(points, names, counted), sep="\n")
    print(f"\nchecked in {ready - started:.0f} s, measured in {time.monotonic() - ready:.0f} s")
    if options.json:
        whole = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": asdict(limits),
            "ours": names, "peers": counted, "points": [point.to_json() for point in points],
            "checked": [asdict(result) for result in checked],
        }  # fmt: skip
        options.json.write_text(json.dumps(whole, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to a file")
    parser.add_argument("--quick", action="store_true", help="two shapes and four numbers of rows")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="these numbers of rows")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="KERNEL/FORMAT",
        help='which of our kernels, for which formats: "marlin*", "*/int4*", "cublas.w8a8/fp8 block w8a8"',
    )  # fmt: skip
    return parser.parse_args()


def _wanted(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern if "/" in pattern else f"{pattern}/*") for pattern in patterns)


def _memory() -> str | None:
    """Return a folder that lies in memory, where there is one."""
    return "/dev/shm" if sys.platform == "linux" and Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
