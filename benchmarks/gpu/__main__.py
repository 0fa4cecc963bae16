"""
Linear layers and experts on a GPU, beside peers in the same run: `python -m benchmarks.gpu [--quick] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import QUICK_ROWS, ROWS, linear_cases
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.checking import check_all, make, refusals_of, tasks_of
from benchmarks.gpu.choice import choose
from benchmarks.gpu.contenders import ours
from benchmarks.gpu.experts import QUICK_TOKENS, TOKENS, expert_cases
from benchmarks.gpu.formats import FORMATS
from benchmarks.gpu.measuring import measure
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.report import Report, markdown
from benchmarks.gpu.table import Names, progress
from quantplug.detect import detect
from quantplug.plugins import registry

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Case, Kind
    from benchmarks.gpu.ceilings import Ceilings
    from benchmarks.gpu.contenders import Contender, Role


def main() -> None:
    """Check everyone, measure everyone, print the tables; write JSON where asked to."""
    options = _options()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU: torch.cuda.is_available() is False here")
    started = time.monotonic()
    rows: dict[Kind, tuple[int, ...]] = {
        "linear": tuple(options.rows or (QUICK_ROWS if options.quick else ROWS)),
        "experts": tuple(options.tokens or (QUICK_TOKENS if options.quick else TOKENS)),
    }
    formats = [kind for kind in FORMATS if wanted(kind, options.formats)]
    cases = linear_cases(formats, quick=options.quick) + expert_cases(formats, quick=options.quick)
    cases = [case for case in cases if case.kind in options.kinds]
    contenders = _contenders(cases, options.only)
    names = {kind: _names(contenders, kind) for kind in dict.fromkeys(case.kind for case in cases)}
    checked = check_all(tasks_of(contenders, cases, rows), options.patience)
    report = Report("", str(detect(registry())), names, [], refusals_of(checked))
    ready = time.monotonic()
    print(*(f"not run: {line}" for line in report.refusals), sep="\n")
    limits = ceilings()
    try:
        for point in measure(checked, cases, rows, limits):
            report.points.append(point)
            print(progress(point, names[point.kind]), flush=True)
            spent = f"Checked in {ready - started:.0f} s, measured in {time.monotonic() - ready:.0f} s."
            report.machine = f"{_machine(limits)} {spent}"
            if options.json:
                report.write(options.json)
    finally:
        # Whatever breaks, and be it the GPU: what was measured is worth its time.
        choose(report.points, report.platform)
        print("", *markdown(report, whole=True), sep="\n", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to a file")
    parser.add_argument("--quick", action="store_true", help="fewer layers and numbers of rows")
    parser.add_argument("--kinds", nargs="+", choices=("linear", "experts"), default=("linear", "experts"))
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="these numbers of rows of linear layers")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="these numbers of rows of experts")
    parser.add_argument(
        "--patience", type=float, default=300.0, metavar="SECONDS", help="what is not checked by then is not measured"
    )
    parser.add_argument("--formats", nargs="+", default=["*"], metavar="FORMAT", help='such as "int4*"')
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help='which contenders, such as "marlin*" "bf16*"'
    )
    return parser.parse_args()


def _machine(limits: Ceilings) -> str:
    """Return the GPU, the day, the versions of what was measured where it is installed, and what the GPU does."""
    installed = []
    for package in ("torch", "triton", "humming-kernels", "sgl-deep-gemm"):
        with suppress(PackageNotFoundError):
            installed.append(f"{package} {version(package)}")
    return (
        f"One {torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}, {', '.join(installed)}: it reads "
        f"{limits.read / 1e12:.2f} TB/s and does {limits.bf16 / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{limits.fp8 / 1e12:.0f} in FP8."
    )


def _contenders(cases: list[Case], patterns: list[str]) -> list[Contender]:
    """Return everyone who takes part, ours before peers."""
    found: list[Contender] = []
    for kind in dict.fromkeys(case.kind for case in cases):
        found += [make(name, kind) for name in ours(kind, [case for case in cases if case.kind == kind])]
        found += [peer for maker in PEERS if (peer := maker()).kind == kind]
    return [contender for contender in found if wanted(contender.name, patterns)]


def _names(contenders: list[Contender], kind: Kind) -> Names:
    def of(role: Role) -> tuple[str, ...]:
        return tuple(each.name for each in contenders if each.kind == kind and each.role == role)

    return Names(of("ours"), of("peer"), of("reference"))


def wanted(name: str, patterns: list[str]) -> bool:
    """Return whether a pattern fits a name, in whatever case."""
    return any(fnmatchcase(name.casefold(), pattern.casefold()) for pattern in patterns)


if __name__ == "__main__":
    main()
