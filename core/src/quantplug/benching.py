"""
How fast kernels are, beside what the machine could do: the figures of `quantplug bench`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quantplug.asking import ask
from quantplug.asking import probe as probe_kernel
from quantplug.benchreport import DENSE, BenchReport, Failure, Point
from quantplug.detect import detect
from quantplug.errors import PlanError, PluginError
from quantplug.kernel import Accepted
from quantplug.planner import activation_dtype
from quantplug.planner import plan as make_plan
from quantplug.plugins import registry as installed
from quantplug.schemes import SchemeCache
from quantplug.select import describe_problem
from quantplug.skip import SchemeRef
from quantplug.spec import LinearProblem, SegmentSpec
from quantplug.timings import Timings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from quantplug.jsonio import Json
    from quantplug.platform import Platform
    from quantplug.registry import Registry
    from quantplug.trial import Workload

    Told = Callable[[str, int, int], None]

SHAPE = (4096, 4096)
"""(N, K) that is measured unless the caller says otherwise."""

_RECIPES = ("int4-g128", "fp8", "mxfp8")
_CPU_ROWS, _ROWS = (1, 4, 16, 64, 256), (1, 4, 16, 64, 256, 1024, 4096)
_QUICK_ROWS = (1, 16, 128)

_FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """A problem to measure, and how a table calls it ("int4-g128")."""

    label: str
    problem: LinearProblem


def default_recipes(registry: Registry | None = None) -> tuple[str, ...]:
    """Return a few recipes that stand for many, of those that are installed."""
    known = (installed() if registry is None else registry).recipes
    return tuple(name for name in _RECIPES if name in known) or tuple(known)[:1]


def default_rows(platform: Platform, *, quick: bool) -> tuple[int, ...]:
    """Return the numbers of rows that are measured unless the caller says otherwise."""
    if quick:
        return _QUICK_ROWS
    return _CPU_ROWS if platform.kind == "cpu" else _ROWS


def cases_of_recipes(
    recipes: Iterable[str], shapes: Sequence[tuple[int, int]], dtype: str, registry: Registry | None = None
) -> list[Case]:
    """
    Return a problem for each recipe ("int4-g128", "fp8") and shape (N, K).

    Raises:
        PluginError: `QP-PLUG-MISSING` when nobody offers a recipe of that name.
        PlanError: `QP-PLAN-POLICY` when the dtype is none that x can have.
    """
    dtype = activation_dtype(dtype, {})
    registry = installed() if registry is None else registry
    schemes = SchemeCache(registry)
    found: list[Case] = []
    for name in recipes:
        recipe = registry.recipe(name).item
        scheme = schemes.get(SchemeRef(recipe.scheme, tuple(sorted(recipe.params.items()))), f"recipe {name!r}")
        for n, k in shapes:
            segment = SegmentSpec(n, scheme.weight_spec())
            found.append(Case(name, LinearProblem(k, (segment,), dtype, activation=scheme.activation_spec())))
    return found


def cases_of_checkpoint(
    source: str | Path,
    *,
    dtype: str | None = None,
    override: Mapping[str, Json] | None = None,
    registry: Registry | None = None,
) -> list[Case]:
    """Return the distinct problems of a checkpoint's linear layers; raises as `plan`."""
    registry = installed() if registry is None else registry
    made = make_plan(source, dtype=dtype, override=override, timings=Timings(), registry=registry)
    problems = dict.fromkeys(layer.problem for layer in made.layers if isinstance(layer.problem, LinearProblem))
    return [Case(_label(problem), problem) for problem in problems if problem is not None]


def bench(
    cases: Sequence[Case],
    *,
    rows: Sequence[int],
    kernels: Sequence[str] = (),
    seconds: float = 0.2,
    platform: Platform | None = None,
    progress: Told | None = None,
    registry: Registry | None = None,
) -> BenchReport:
    """
    Measure every kernel that accepts a problem, on the machine at hand, once its result was held against the exact one.

    Args:
        cases: what to measure.
        rows: numbers of rows M.
        kernels: names or globs of kernels; () takes all but those of the last resort.
        seconds: how long each point is measured, about.
        platform: of the machine at hand; None detects it.
        progress: told (what comes next, cases done, cases in all).
        registry: plugins to ask; None asks the installed ones.

    Raises:
        PluginError: `QP-PLUG-MISSING` when a name or glob fits no kernel.
        PlanError: `QP-PLAN-TIMINGS` when there is nothing to measure.
    """
    import torch

    from quantplug.stopwatch import ceilings
    from quantplug.trial import Workload

    registry = installed() if registry is None else registry
    platform = detect(registry) if platform is None else platform
    wanted = sorted(set(rows))
    if not cases or not wanted or wanted[0] < 1:
        raise PlanError("QP-PLAN-TIMINGS", "bench", "nothing to measure", expected="a problem, and rows from 1 on")
    names = _names(registry, kernels)
    refused = {name for name in names if probe_kernel(registry.kernels[name].item, platform) is not None}
    device = torch.device(platform.kind)
    points: list[Point] = []
    failures: list[Failure] = []
    with torch.inference_mode():
        reached = ceilings(device, list(dict.fromkeys(case.problem.dtype for case in cases)))
        for number, case in enumerate(cases):
            if progress is not None:
                progress(f"{case.label} {case.problem.out_features}x{case.problem.in_features}", number, len(cases))
            work = Workload(case.problem, device, wanted, seconds)
            dense = work.dense()
            figures = _Figures(case, reached.read, reached.flops[case.problem.dtype], dict(dense.us))
            points += figures.points(DENSE, dense.nbytes, dense.us)
            for name in [name for name in names if name not in refused]:
                _run(name, work, figures, platform, registry, points, failures)
    if progress is not None:
        progress("", len(cases), len(cases))
    versions = {**dict(platform.versions), **{info.distribution: info.version for info in registry.plugins}}
    return BenchReport(
        device=platform.device,
        platform=str(platform),
        versions=tuple(sorted(versions.items())),
        read=reached.read,
        flops=tuple(reached.flops.items()),
        points=tuple(points),
        failures=tuple(failures),
    )


class _Figures:
    """Turns times into figures, for one case."""

    def __init__(self, case: Case, read: float, flops: float, dense: dict[int, float]) -> None:
        self.case = case
        self.dense = dense
        self._read = read
        self._flops = flops

    @property
    def shape(self) -> tuple[int, int]:
        return self.case.problem.out_features, self.case.problem.in_features

    def points(self, kernel: str, held: int, us: Iterable[tuple[int, float]]) -> list[Point]:
        (n, k), dtype = self.shape, self.case.problem.dtype
        found: list[Point] = []
        for m, time in us:
            moved = held + m * (n + k) * _FLOAT_BYTES[dtype]
            bytes_per_s, flops = moved / time * 1e6, 2 * m * n * k / time * 1e6
            found.append(
                Point(
                    kernel, self.case.label, (n, k), dtype, m, time, moved, bytes_per_s / 1e9, flops / 1e12,
                    bytes_per_s / self._read, flops / self._flops, self.dense[m] / time,
                )
            )  # fmt: skip
        return found


def _run(
    name: str,
    work: Workload,
    figures: _Figures,
    platform: Platform,
    registry: Registry,
    points: list[Point],
    failures: list[Failure],
) -> None:
    kernel = registry.kernels[name].item
    verdict = ask(kernel, figures.case.problem, platform)
    if not isinstance(verdict, Accepted):
        return
    trial = work.run(kernel, verdict)
    if trial.us:
        points += figures.points(name, trial.nbytes, trial.us)
    else:
        reason = trial.wrong or "needs more memory than there is"
        failures.append(Failure(name, figures.case.label, figures.shape, reason))


def _names(registry: Registry, wanted: Sequence[str]) -> list[str]:
    if not wanted:
        return [name for name, provided in registry.kernels.items() if not provided.item.traits.fallback]
    found: dict[str, None] = {}
    for pattern in wanted:
        fitting = [name for name in registry.kernels if fnmatchcase(name, pattern)]
        if not fitting:
            raise PluginError(
                "QP-PLUG-MISSING", f"kernel {pattern!r}", "no installed kernel has such a name",
                expected=f"one of: {', '.join(registry.kernels)}", fix="Install the plugin that brings it.",
            )  # fmt: skip
        found |= dict.fromkeys(fitting)
    return list(found)


def _label(problem: LinearProblem) -> str:
    return describe_problem(problem).partition("] ")[2].rpartition(", ")[0]
