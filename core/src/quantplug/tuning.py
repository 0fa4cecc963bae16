"""
Measuring the kernels that a checkpoint's layers could run on, so that plans on this machine go by it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.choices import ROW_BUCKETS
from quantplug.errors import PlanError
from quantplug.isolation import Fault, isolated
from quantplug.kernel import Accepted
from quantplug.planner import plan as make_plan
from quantplug.plugins import registry as installed
from quantplug.select import describe_problem, kernels_for
from quantplug.spec import LinearProblem
from quantplug.timings import Measurement, Timings, problem_key, versions_of
from quantplug.timingstore import VARIABLE, add_timings, store_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from quantplug.jsonio import Json
    from quantplug.moe import MoEProblem
    from quantplug.onload import OnLoad
    from quantplug.plan import Decision, Plan
    from quantplug.policy import Policy
    from quantplug.registry import Registry
    from quantplug.trial import Workload
    from quantplug.trialexperts import ExpertWorkload

    Told = Callable[[str, int, int], None]

CPU_ROWS = (1, 4, 16, 64, 256, 1024)
"""Numbers of rows that are measured on a CPU, which takes seconds for more."""

SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class TunedProblem:
    """
    One distinct problem of a checkpoint.

    Attributes:
        problem: what its layers ask.
        layers: how many of them there are.
        before: what was decided by estimates.
        after: what a plan decides now.
        measurements: one per kernel, in the order of the decision before.
    """

    problem: LinearProblem | MoEProblem
    layers: int
    before: Decision
    after: Decision
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class TuneReport:
    """
    What was measured.

    Attributes:
        device: name of the machine.
        platform: the platform in words.
        path: the file that keeps it.
        problems: each distinct problem.
        skipped: what was not measured, and why.
        warnings: about the file.
    """

    device: str
    platform: str
    path: str
    problems: tuple[TunedProblem, ...]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def tune(
    source: str | Path,
    *,
    rows: Sequence[int] = (),
    seconds: float = SECONDS,
    dtype: str | None = None,
    policy: Policy | None = None,
    override: Mapping[str, Json] | None = None,
    quantize: OnLoad | str | None = None,
    progress: Told | None = None,
    registry: Registry | None = None,
) -> TuneReport:
    """
    Measure every kernel that accepts a layer of a checkpoint, on the machine at hand, and keep the times.

    A result is first held against the exact one; a kernel that is wrong is kept as that, and no plan chooses it. Each
    problem is kept as soon as it was measured, so that an interrupted run loses little. Kernels of the last resort, and
    those that a policy denies, are not measured.

    Args:
        source: checkpoint directory, or a Hugging Face repository id.
        rows: numbers of rows M; () takes powers of two up to 8192, of four up to 1024 on a CPU.
        seconds: how long each kernel is measured for each number of rows, about.
        dtype: as for `plan`.
        policy: as for `plan`.
        override: as for `plan`.
        quantize: as for `plan`.
        progress: told ("[576, 576] int4 …", problems done, problems in all) before each problem, and at the end.
        registry: plugins to ask; None asks the installed ones.

    Raises:
        PlanError: `QP-PLAN-TIMINGS` when the times cannot be kept; and as `plan`.
    """
    registry = installed() if registry is None else registry
    path = store_path()
    if path is None:
        raise PlanError(
            "QP-PLAN-TIMINGS", "tune", f"{VARIABLE}=off keeps no measured times", expected="a file to keep them in",
            fix=f"Unset {VARIABLE}, or name a file in it.",
        )  # fmt: skip

    def planned(timings: Timings) -> Plan:
        return make_plan(
            source, dtype=dtype, policy=policy, override=override, quantize=quantize, timings=timings, registry=registry
        )

    before = planned(Timings())
    asked = Counter(layer.problem for layer in before.layers if layer.problem is not None)
    indices = {layer.problem: layer.decision for layer in reversed(before.layers) if layer.decision is not None}
    wanted = tuple(sorted(set(rows))) or (CPU_ROWS if before.platform.kind == "cpu" else ROW_BUCKETS)
    measured: dict[LinearProblem | MoEProblem, tuple[Measurement, ...]] = {}
    kept = Timings()
    warnings: list[str] = []
    skipped: list[str] = []
    for number, problem in enumerate(asked):
        if progress is not None:
            progress(describe_problem(problem), number, len(asked))
        measured[problem] = _measure(
            problem, before.decisions[indices[problem]], before, wanted, seconds, registry, skipped
        )
        kept = add_timings(path, measured[problem])
        warnings += [kept.warning] if kept.warning and kept.warning not in warnings else []
    if progress is not None:
        progress("", len(asked), len(asked))
    after = planned(kept)
    return TuneReport(
        device=before.platform.device,
        platform=str(before.platform),
        path=str(path),
        problems=tuple(
            TunedProblem(
                problem, asked[problem], before.decisions[indices[problem]], after.decisions[indices[problem]], found
            )
            for problem, found in measured.items()
        ),
        skipped=tuple(skipped),
        warnings=tuple(warnings),
    )


def _measure(
    problem: LinearProblem | MoEProblem,
    decision: Decision,
    plan: Plan,
    rows: Sequence[int],
    seconds: float,
    registry: Registry,
    skipped: list[str],
) -> tuple[Measurement, ...]:
    import torch

    kernels = kernels_for(problem, registry)
    found: list[Measurement] = []
    with torch.inference_mode():
        work = _workload(problem, torch.device(plan.platform.kind), rows, seconds)
        for candidate in decision.candidates:
            kernel = kernels[candidate.kernel].item
            if not isinstance(candidate.verdict, Accepted) or kernel.traits.fallback:
                continue
            # The kernels of a problem are those of its workload, which no type says.
            trial = work.run(kernel, candidate.verdict)  # type: ignore[arg-type]
            _check_device(work, candidate.kernel)
            if not trial.us and not trial.wrong:
                skipped.append(f"{describe_problem(problem)}: {candidate.kernel} needs more memory than there is")
                continue
            versions = versions_of(kernels[candidate.kernel].plugin, plan.platform, registry)
            found.append(
                Measurement(
                    plan.platform.device, str(plan.platform), problem_key(problem), candidate.kernel, versions,
                    trial.us, trial.wrong,
                )
            )  # fmt: skip
    return tuple(found)


def _workload(
    problem: LinearProblem | MoEProblem, device: torch.device, rows: Sequence[int], seconds: float
) -> Workload | ExpertWorkload:
    from quantplug.trial import Workload
    from quantplug.trialexperts import ExpertWorkload

    if isinstance(problem, LinearProblem):
        return Workload(problem, device, rows, seconds)
    return ExpertWorkload(problem, device, rows, seconds)


def _check_device(work: Workload | ExpertWorkload, kernel: str) -> None:
    """Raise when a kernel left the device unusable: what comes after it would be blamed for that."""
    fault = isolated(work.touch)
    if isinstance(fault, Fault):
        raise PlanError(
            "QP-PLAN-TIMINGS",
            kernel,
            f"left the device unusable ({fault.error})",
            expected="a device on which the next kernel can be measured",
            fix=f'Report it to its maker, and measure the others with a policy that has deny = ["{kernel}"].',
        )
