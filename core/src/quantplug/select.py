"""
Which kernel runs a layer: everyone is asked, everyone's answer is kept, and the order is a plain sort.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantplug.asking import ask
from quantplug.choices import bytes_held, choices, may_join, mean_time
from quantplug.errors import PlanError
from quantplug.kernel import Accepted, Rejected
from quantplug.plan import Candidate, Choice, Decision
from quantplug.spec import LinearProblem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from quantplug.inventory import ModuleInfo
    from quantplug.moe import MoEProblem
    from quantplug.moekernel import Kernel
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Provided, Registry
    from quantplug.timings import Measurement, Timings

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

    A layer is held in one layout, whose kernels share the numbers of rows among them. So it is layouts that are
    compared, by the mean time of their kernels over the policy's numbers of rows: who is fastest for one row may be the
    slowest for many. The candidates are ordered by (policy, mean time of the layout, own mean time, name), on an
    accelerator those that would keep a layer from being captured in a graph behind all others, and last resorts behind
    these. Who of a layout serves how many rows is decided at `ROW_BUCKETS`, whichever numbers count.

    Where some candidates were measured, the others stand behind them: a measured time is kept rather than given up for
    a claim. Those that hold far more bytes than another stand behind, too: time is not all.

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
    _sort(candidates, problem, kernels, platform, policy.rows)
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
    if pin is not None or accepted[0].preferred:
        return Decision((Choice(accepted[0].kernel, first.layout_id),), tuple(candidates))
    same_layout = [
        c
        for c in accepted
        if kernels[c.kernel].item.layout_id == first.layout_id and may_join(kernels[c.kernel].item, first, platform)
    ]
    basis: Literal["estimated", "measured"] = "measured" if accepted[0].measured else "estimated"
    return Decision(choices(same_layout, kernels, basis), tuple(candidates), basis)


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
        elif provided.item.traits.by_request and not policy.asks_for(module, name):
            verdict = Rejected("policy", "is chosen by request only", f'allow = ["{name}"]')
        elif measurement is not None and measurement.wrong:
            verdict = Rejected(
                "probe", f"was wrong when it was measured: {measurement.wrong}", "report it to its maker"
            )
    accepted = isinstance(verdict, Accepted)
    return Candidate(name, provided.plugin, verdict, said, measurement.us if measurement and accepted else ())


def _sort(
    candidates: list[Candidate],
    problem: LinearProblem | MoEProblem,
    kernels: Mapping[str, Provided[Kernel]],
    platform: Platform,
    rows: Sequence[int],
) -> None:
    """Put the best candidates first, see `select`."""
    heavy = _heavy(candidates, problem, kernels)

    def standing(candidate: Candidate) -> tuple[bool, ...]:
        traits = kernels[candidate.kernel].item.traits
        return (
            isinstance(candidate.verdict, Rejected),
            not candidate.preferred,
            traits.fallback,
            platform.kind != "cpu" and not traits.graph_safe,
            candidate.kernel in heavy,
            not candidate.measured,
        )

    sharing: dict[tuple[tuple[bool, ...], str], list[Candidate]] = {}
    for candidate in candidates:
        sharing.setdefault((standing(candidate), kernels[candidate.kernel].item.layout_id), []).append(candidate)
    ranks: dict[str, tuple[tuple[bool, ...], float, float, str]] = {}
    for (place, _), some in sharing.items():
        if isinstance(some[0].verdict, Rejected):
            ranks |= {c.kernel: (place, math.inf, math.inf, c.kernel) for c in some}
            continue
        basis: Literal["estimated", "measured"] = "measured" if all(c.measured for c in some) else "estimated"
        together = mean_time(some, rows, basis)
        ranks |= {c.kernel: (place, together, mean_time([c], rows, basis), c.kernel) for c in some}
    candidates.sort(key=lambda candidate: ranks[candidate.kernel])


def _heavy(
    candidates: Sequence[Candidate], problem: LinearProblem | MoEProblem, kernels: Mapping[str, Provided[Kernel]]
) -> set[str]:
    """Return who holds far more bytes than another candidate of whom as much is known."""
    heavy: set[str] = set()
    for known in (True, False):
        some = {
            c.kernel: bytes_held(problem, c)
            for c in candidates
            if isinstance(c.verdict, Accepted)
            and bool(c.measured) is known
            and not kernels[c.kernel].item.traits.fallback
        }
        heavy |= {name for name, held in some.items() if held > _MOST_TIMES_THE_BYTES * min(some.values())}
    return heavy


def _all_reasons(candidates: list[Candidate], registry: Registry) -> str:
    lines = [
        f"{c.kernel} ({c.plugin}): {c.verdict.reason}" + (f" ({c.verdict.fix})" if c.verdict.fix else "")
        for c in candidates
        if isinstance(c.verdict, Rejected)
    ]
    lines += [f"note that {failure}" for failure in registry.failures]
    return "; ".join(lines) or "no kernel is installed"
