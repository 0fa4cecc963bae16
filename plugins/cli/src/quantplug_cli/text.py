"""
Numbers and verdicts as people read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Rejected

if TYPE_CHECKING:
    from quantplug.kernel import Verdict
    from quantplug.plan import Choice, Decision

_STEP = 1000


def size(count: float) -> str:
    """Return bytes as `116 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < _STEP:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} TB"


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
