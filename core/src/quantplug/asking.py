"""
Asking kernels: one that raises has refused, and one that needs uniform segments is asked about each of them.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import TYPE_CHECKING

from quantplug.isolation import Fault, isolated
from quantplug.kernel import Accepted, Cost, LinearKernel, Rejected
from quantplug.moe import MoEProblem
from quantplug.moekernel import MoEKernel
from quantplug.spec import LinearProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from quantplug.kernel import Verdict
    from quantplug.moekernel import Kernel
    from quantplug.platform import Platform


def ask(kernel: Kernel, problem: LinearProblem | MoEProblem, platform: Platform) -> Verdict:
    """
    Ask a kernel about a problem of its kind; where it needs uniform segments and has others, about each segment.

    A split problem costs the sum of its parts. A kernel that raises, or answers with something else, has refused.
    """
    if isinstance(problem, LinearProblem) and isinstance(kernel, LinearKernel):
        return _ask_linear(kernel, problem, platform)
    if isinstance(problem, MoEProblem) and isinstance(kernel, MoEKernel):
        return _answer(kernel, lambda: kernel.supports(problem, platform))
    raise TypeError(f"{type(kernel).__name__} is no kernel for a {type(problem).__name__}")


def _ask_linear(kernel: LinearKernel, problem: LinearProblem, platform: Platform) -> Verdict:
    if not kernel.traits.uniform_segments or problem.uniform:
        return _answer(kernel, lambda: kernel.supports(problem, platform))
    parts: list[Accepted] = []
    for part in split(problem):
        verdict = _answer(kernel, partial(kernel.supports, part, platform))
        if isinstance(verdict, Rejected):
            return verdict
        parts.append(verdict)
    return Accepted(
        reduce(Cost.plus, (p.cost for p in parts)),
        casts=tuple(dict.fromkeys(cast for p in parts for cast in p.casts)),
        extra_bytes=sum(p.extra_bytes for p in parts),
        notes=(
            f"split into {len(parts)} calls: segments differ",
            *dict.fromkeys(note for p in parts for note in p.notes),
        ),
        quantizes_x=any(p.quantizes_x for p in parts),
        dequantize_us=_sum_of(p.dequantize_us for p in parts),
    )


def _sum_of(times: Iterable[float | None]) -> float | None:
    """Return the sum, None when one of them is not known."""
    known = list(times)
    return None if None in known else sum(time for time in known if time is not None)


def probe(kernel: Kernel, platform: Platform) -> Rejected | None:
    """Let a kernel try itself out on this very machine; one that raises has refused."""
    said = isolated(lambda: kernel.probe(platform))
    return said if said is None or isinstance(said, Rejected) else _broken(kernel, "probe", said)


def _answer(kernel: Kernel, supports: Callable[[], Verdict]) -> Verdict:
    said = isolated(supports)
    return said if isinstance(said, (Accepted, Rejected)) else _broken(kernel, "supports", said)


def _broken(kernel: Kernel, method: str, answer: object) -> Rejected:
    said = f"raised {answer.error}" if isinstance(answer, Fault) else f"returned {type(answer).__name__}"
    return Rejected("error", f"{method} {said}", f"report it to the maker of {kernel.name}")


def split(problem: LinearProblem) -> tuple[LinearProblem, ...]:
    """Return one problem per segment."""
    return tuple(
        LinearProblem(problem.in_features, (segment,), problem.dtype, problem.bias, problem.activation)
        for segment in problem.segments
    )
