"""
Numbers and verdicts as people read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Rejected

if TYPE_CHECKING:
    from quantplug.kernel import Verdict
    from quantplug.plan import Candidate, Choice, Decision

_STEP = 1000


def size(count: float) -> str:
    """Return bytes as `116 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < _STEP:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} TB"


def microseconds(us: float) -> str:
    """Return microseconds with as many digits as a measurement is worth: 3.41, 21.9, 2,048."""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def told(decision: Decision) -> list[Candidate]:
    """Return the candidates worth a line: the refusal of one that the core derived from another's kernel is not."""
    from quantplug.dense import SUFFIX

    names = {candidate.kernel for candidate in decision.candidates}
    return [
        candidate
        for candidate in decision.candidates
        if isinstance(candidate.verdict, Accepted)
        or not candidate.kernel.endswith(SUFFIX)
        or candidate.kernel.removesuffix(SUFFIX) not in names
    ]


def measured(us: tuple[tuple[int, float], ...]) -> str:
    """Return `; measured: 21.9 us at M = 1, 148 at M = 16`, or "" when nothing was."""
    if not us:
        return ""
    (first, time), *others = us
    parts = [f"{microseconds(time)} us at M = {first}", *(f"{microseconds(time)} at M = {m}" for m, time in others)]
    return f"; measured: {', '.join(parts)}"


def choices(decision: Decision) -> str:
    """Return the kernels of a decision: `cpu.int4`, `a (M <= 15), b (M >= 16)`, or `cpu.w8a8 (quantizes x)`."""
    quantizing = {c.kernel for c in decision.candidates if isinstance(c.verdict, Accepted) and c.verdict.quantizes_x}
    words = []
    for choice in decision.choices:
        remarks = [rows(choice)] if len(decision.choices) > 1 else []
        remarks += ["quantizes x"] if choice.kernel in quantizing else []
        words.append(choice.kernel + (f" ({', '.join(remarks)})" if remarks else ""))
    return ", ".join(words)


def rows(choice: Choice) -> str:
    """Return the rows a choice serves."""
    if choice.max_rows is None:
        return f"M >= {choice.min_rows}" if choice.min_rows else "every M"
    return f"M <= {choice.max_rows}" if not choice.min_rows else f"M = {choice.min_rows} … {choice.max_rows}"


def verdict(answer: Verdict) -> str:
    """Return a kernel's answer in one line."""
    if isinstance(answer, Rejected):
        return f"refused ({answer.code}): {answer.reason}" + (f"; {answer.fix}" if answer.fix else "")
    parts = [f"accepts, about {answer.cost.at(1):,.0f} us at M = 1 and {answer.cost.at(512):,.0f} us at M = 512"]
    parts += ["quantizes x as the file permits"] if answer.quantizes_x else []
    parts += [f"rounds {cast.what} to {cast.dtype}" for cast in answer.casts]
    parts += answer.notes
    return "; ".join(parts)
