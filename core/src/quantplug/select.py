"""
Which kernel runs a layer: everyone is asked, everyone's answer is kept, and the order is a plain sort.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantplug.asking import ask
from quantplug.errors import PlanError
from quantplug.kernel import Accepted, Cost, Rejected
from quantplug.plan import Candidate, Choice, Decision
from quantplug.spec import LinearProblem
from quantplug.timings import time_at

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from quantplug.inventory import ModuleInfo
    from quantplug.moe import MoEProblem
    from quantplug.moekernel import Kernel
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Provided, Registry
    from quantplug.timings import Measurement, Timings

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of rows M at which kernels are compared; between two of them the lower one's choice holds."""

_NOISE = 0.03
"""What medians of one kernel differ by from one run to the next; a gain below it is no reason for another kernel."""

_MOST_TIMES_THE_BYTES = 1.5
"""
Times the bytes of the smallest measured layout that another may hold and be chosen for its time: room for padding and
wider codes, and too little for a dense copy of 8-bit weights or fewer, which undoes what they were quantized for.
"""


def select(
    problem: LinearProblem | MoEProblem,
    module: ModuleInfo,
    platform: Platform,
    registry: Registry,
    policy: Policy,
    probes: Mapping[str, Rejected | None],
    timings: Timings | None = None,
) -> Decision:
    """
    Choose the kernels of one layer.

    The candidates are ordered by (policy, measured time of one row, estimated cost of one row, name), last resorts
    behind all others. The first gives the layout; for more rows, faster kernels that share that layout take over, but
    on an accelerator none that would keep a layer from being captured in a graph.

    Where some candidates were measured, the others stand behind them: a measured time is kept rather than given up for
    a claim. Of those that were, the ones that hold far more bytes than another stand behind, too: time is not all, and
    an estimate may count memory, but a measurement does not.

    Args:
        problem: what is to run.
        module: the layer it is for, which policies match on.
        platform: the machine it is for.
        registry: who can be asked.
        policy: the caller's wishes.
        probes: refusals found on this very machine, by kernel name; empty when planning for another.
        timings: what was measured; what holds for another machine, or was measured with other versions, plays no part.

    Raises:
        PlanError: `QP-PLAN-PIN` when a pinned kernel refuses, `QP-PLAN-NOKERNEL` when all do; both carry every reason.
    """
    kernels = kernels_for(problem, registry)
    measured = {} if timings is None else timings.of(problem, platform, kernels, registry)
    candidates = sorted(
        (
            _ask(provided, problem, module, platform, policy, probes, measured.get(name))
            for name, provided in kernels.items()
        ),
        key=lambda candidate: candidate.kernel,
    )
    least = min((_held(problem, c) for c in candidates if c.measured), default=0)
    heavy = {c.kernel for c in candidates if c.measured and _held(problem, c) > _MOST_TIMES_THE_BYTES * least}
    candidates.sort(key=lambda candidate: _rank(candidate, kernels, heavy))
    accepted = [candidate for candidate in candidates if isinstance(candidate.verdict, Accepted)]
    pin = policy.pin(module)
    if pin is not None and not any(pin.names(candidate.kernel) for candidate in accepted):
        refusal = next((c.verdict for c in candidates if pin.names(c.kernel)), None)
        raise PlanError(
            "QP-PLAN-PIN",
            module.path,
            f"{pin.kernels[0]} is pinned by {pin.origin} and "
            + (f"refuses: {refusal.reason}" if isinstance(refusal, Rejected) else "is not installed"),
            expected="a kernel that accepts the layer",
            fix=(refusal.fix if isinstance(refusal, Rejected) else "")
            or f"Kernels that accept it: {', '.join(c.kernel for c in accepted) or 'none'}",
        )
    if not accepted:
        raise PlanError(
            "QP-PLAN-NOKERNEL",
            module.path,
            f"no kernel runs {describe_problem(problem)} on {platform}",
            expected="one installed kernel that accepts it",
            fix=_all_reasons(candidates, registry),
        )
    first = kernels[accepted[0].kernel].item
    same_layout = [
        c
        for c in accepted
        if kernels[c.kernel].item.layout_id == first.layout_id
        and (kernels[c.kernel].item.traits.graph_safe or not first.traits.graph_safe or platform.kind == "cpu")
    ]
    if pin is not None or accepted[0].policy:
        return Decision((Choice(accepted[0].kernel),), first.layout_id, tuple(candidates))
    if accepted[0].measured:
        return Decision(_measured_choices(same_layout), first.layout_id, tuple(candidates), "measured")
    return Decision(_estimated_choices(same_layout), first.layout_id, tuple(candidates))


def describe_problem(problem: LinearProblem | MoEProblem) -> str:
    """Return a problem in words: `[576, 576] int4 group 64, bfloat16`."""
    if not isinstance(problem, LinearProblem):
        return problem.describe()
    kinds = " + ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
    return f"[{problem.out_features}, {problem.in_features}] {kinds}, {problem.dtype}"


def kernels_for(problem: LinearProblem | MoEProblem, registry: Registry) -> Mapping[str, Provided[Kernel]]:
    """Return the kernels that can be asked about a problem, by name."""
    return registry.kernels if isinstance(problem, LinearProblem) else registry.moe_kernels


def _ask(
    provided: Provided[Kernel],
    problem: LinearProblem | MoEProblem,
    module: ModuleInfo,
    platform: Platform,
    policy: Policy,
    probes: Mapping[str, Rejected | None],
    measurement: Measurement | None,
) -> Candidate:
    name = provided.item.name
    verdict = ask(provided.item, problem, platform)
    wish = policy.wish(module, name)
    pin = policy.pin(module)
    said = f"{wish.wish} ({wish.origin})" if wish is not None else ""
    if isinstance(verdict, Accepted):
        refusal = probes.get(name)
        if refusal is not None:
            verdict = refusal
        elif wish is not None and wish.wish == "deny":
            verdict = Rejected("policy", f"denied by {wish.origin}")
        elif pin is not None and not pin.names(name):
            verdict = Rejected("policy", f"{pin.kernels[0]} is pinned by {pin.origin}")
        elif measurement is not None and measurement.wrong:
            verdict = Rejected(
                "probe", f"was wrong when it was measured: {measurement.wrong}", "report it to its maker"
            )
    accepted = isinstance(verdict, Accepted)
    return Candidate(name, provided.plugin, verdict, said, measurement.us if measurement and accepted else ())


def _held(problem: LinearProblem | MoEProblem, candidate: Candidate) -> int:
    """Return the bytes that an accepted candidate holds."""
    return problem.stored_bytes + (candidate.verdict.extra_bytes if isinstance(candidate.verdict, Accepted) else 0)


def _rank(
    candidate: Candidate, kernels: Mapping[str, Provided[Kernel]], heavy: AbstractSet[str]
) -> tuple[bool, bool, bool, bool, float, float, str]:
    verdict = candidate.verdict
    refused = isinstance(verdict, Rejected)
    return (
        refused,
        not candidate.policy.startswith(("pin", "prefer")),
        kernels[candidate.kernel].item.traits.fallback,
        candidate.kernel in heavy or not candidate.measured,
        time_at(candidate.measured, 1) if candidate.measured else math.inf,
        0.0 if isinstance(verdict, Rejected) else verdict.cost.at(1),
        candidate.kernel,
    )


def _estimated_choices(candidates: list[Candidate]) -> tuple[Choice, ...]:
    best = [(rows, min(candidates, key=lambda c: (_cost(c).at(rows), c.kernel)).kernel) for rows in ROW_BUCKETS]
    return _ranges(best)


def _measured_choices(candidates: list[Candidate]) -> tuple[Choice, ...]:
    """Return who was fastest from each measured number of rows on; who is so by less than repeats differ is not."""
    times = {c.kernel: c.measured for c in candidates if c.measured}
    best: list[tuple[int, str]] = []
    for rows in sorted({rows for measured in times.values() for rows, _ in measured}):
        name = min(times, key=lambda kernel: (time_at(times[kernel], rows), kernel))
        if best and time_at(times[name], rows) > (1 - _NOISE) * time_at(times[best[-1][1]], rows):
            name = best[-1][1]
        best.append((rows, name))
    return _ranges(best)


def _ranges(best: list[tuple[int, str]]) -> tuple[Choice, ...]:
    """Return the choices from (rows, the kernel from there on), by rising rows."""
    best = [(rows, name) for n, (rows, name) in enumerate(best) if not n or best[n - 1][1] != name]
    ends = [start - 1 for start, _ in best[1:]]
    starts = [0] + [start for start, _ in best[1:]]
    return tuple(Choice(name, start, end) for (_, name), start, end in zip(best, starts, [*ends, None], strict=True))


def _cost(candidate: Candidate) -> Cost:
    if isinstance(candidate.verdict, Rejected):
        raise TypeError(f"{candidate.kernel} was refused and has no cost")
    return candidate.verdict.cost


def _all_reasons(candidates: list[Candidate], registry: Registry) -> str:
    lines = [
        f"{c.kernel} ({c.plugin}): {c.verdict.reason}" + (f" ({c.verdict.fix})" if c.verdict.fix else "")
        for c in candidates
        if isinstance(c.verdict, Rejected)
    ]
    lines += [f"note that {failure}" for failure in registry.failures]
    return "; ".join(lines) or "no kernel is installed"
