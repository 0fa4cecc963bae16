"""
Which kernel runs a layer: everyone is asked, everyone's answer is kept, and the order is a plain sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import PlanError
from quantplug.isolation import Fault, isolated
from quantplug.kernel import Accepted, Cost, LinearKernel, Rejected, Verdict
from quantplug.plan import Candidate, Choice, Decision
from quantplug.spec import LinearProblem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.inventory import ModuleInfo
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Registry

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of rows M at which kernels are compared; between two of them the lower one's choice holds."""


def select(
    problem: LinearProblem,
    module: ModuleInfo,
    platform: Platform,
    registry: Registry,
    policy: Policy,
    probes: Mapping[str, Rejected | None],
) -> Decision:
    """
    Choose the kernels of one layer.

    The candidates are ordered by (policy, estimated cost of one row, name), last resorts behind all others. The first
    gives the layout; for more rows, cheaper kernels that share that layout take over.

    Args:
        problem: what is to run.
        module: the layer it is for, which policies match on.
        platform: the machine it is for.
        registry: who can be asked.
        policy: the caller's wishes.
        probes: refusals found on this very machine, by kernel name; empty when planning for another.

    Raises:
        PlanError: `QP-PLAN-PIN` when a pinned kernel refuses, `QP-PLAN-NOKERNEL` when all do; both carry every reason.
    """
    candidates = sorted(
        (_ask(name, registry, problem, module, platform, policy, probes) for name in registry.kernels),
        key=lambda candidate: _rank(candidate, registry),
    )
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
    first = registry.kernels[accepted[0].kernel].item
    same_layout = [c for c in accepted if registry.kernels[c.kernel].item.layout_id == first.layout_id]
    return Decision(_choices(same_layout, pinned=pin is not None), first.layout_id, tuple(candidates))


def describe_problem(problem: LinearProblem) -> str:
    """Return a problem in words: `[576, 576] int4 group 64, bfloat16`."""
    kinds = " + ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
    return f"[{problem.out_features}, {problem.in_features}] {kinds}, {problem.dtype}"


def ask(kernel: LinearKernel, problem: LinearProblem, platform: Platform) -> Verdict:
    """
    Ask a kernel about a problem; where it needs uniform segments and has others, about each segment.

    A split problem costs the sum of its parts.
    """
    if not kernel.traits.uniform_segments or problem.uniform:
        return _answer(kernel, problem, platform)
    parts: list[Accepted] = []
    for part in split(problem):
        verdict = _answer(kernel, part, platform)
        if isinstance(verdict, Rejected):
            return verdict
        parts.append(verdict)
    return Accepted(
        Cost(sum(p.cost.fixed_us for p in parts), sum(p.cost.row_us for p in parts)),
        casts=tuple(dict.fromkeys(cast for p in parts for cast in p.casts)),
        extra_bytes=sum(p.extra_bytes for p in parts),
        notes=(
            f"split into {len(parts)} calls: segments differ",
            *dict.fromkeys(note for p in parts for note in p.notes),
        ),
    )


def probe(kernel: LinearKernel, platform: Platform) -> Rejected | None:
    """Let a kernel try itself out on this very machine; one that raises has refused."""
    answer = isolated(lambda: kernel.probe(platform))
    return answer if answer is None or isinstance(answer, Rejected) else _broken(kernel, "probe", answer)


def _answer(kernel: LinearKernel, problem: LinearProblem, platform: Platform) -> Verdict:
    answer = isolated(lambda: kernel.supports(problem, platform))
    return answer if isinstance(answer, (Accepted, Rejected)) else _broken(kernel, "supports", answer)


def _broken(kernel: LinearKernel, method: str, answer: object) -> Rejected:
    said = f"raised {answer.error}" if isinstance(answer, Fault) else f"returned {type(answer).__name__}"
    return Rejected("error", f"{method} {said}", f"report it to the maker of {kernel.name}")


def split(problem: LinearProblem) -> tuple[LinearProblem, ...]:
    """Return one problem per segment."""
    return tuple(
        LinearProblem(problem.in_features, (segment,), problem.dtype, problem.bias, problem.activation)
        for segment in problem.segments
    )


def _ask(
    name: str,
    registry: Registry,
    problem: LinearProblem,
    module: ModuleInfo,
    platform: Platform,
    policy: Policy,
    probes: Mapping[str, Rejected | None],
) -> Candidate:
    provided = registry.kernels[name]
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
    return Candidate(name, provided.plugin, verdict, said)


def _rank(candidate: Candidate, registry: Registry) -> tuple[bool, bool, bool, float, str]:
    verdict = candidate.verdict
    refused = isinstance(verdict, Rejected)
    return (
        refused,
        not candidate.policy.startswith(("pin", "prefer")),
        registry.kernels[candidate.kernel].item.traits.fallback,
        0.0 if isinstance(verdict, Rejected) else verdict.cost.at(1),
        candidate.kernel,
    )


def _choices(candidates: list[Candidate], *, pinned: bool) -> tuple[Choice, ...]:
    if pinned or candidates[0].policy:
        return (Choice(candidates[0].kernel),)
    best: list[tuple[int, str]] = []
    for rows in ROW_BUCKETS:
        name = min(candidates, key=lambda c: (_cost(c).at(rows), c.kernel)).kernel
        if not best or best[-1][1] != name:
            best.append((rows, name))
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
