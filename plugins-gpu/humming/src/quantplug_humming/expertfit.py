"""
Which mixtures of experts the kernel takes, which it refuses, and what they cost: known without a GPU and humming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.expertlimits import refuse_mixture
from quantplug.kernel import Accepted, Cast, Cost, Verdict
from quantplug.spec import LinearProblem, SegmentSpec
from quantplug_humming.fit import DTYPE, bytes_held, casts, notes, reading_us, refuse, row_us
from quantplug_humming.form import ALIGNED, Form, form_of

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform

MOST_EXPERTS = 1024
"""Routing counts the choices of all experts at once."""

# One H100, see README.md: what a call takes beside reading weights, and how much longer a row takes than in a linear
# layer.
_CALL_US = 21.0
_SLOWER = 1.3


def products(problem: MoEProblem) -> tuple[LinearProblem, LinearProblem]:
    """
    Return both products of an expert as humming runs them.

    Gate and up, and so what lies between the products, are filled up to a multiple of 8 each.
    """
    width = -(-problem.intermediate // ALIGNED) * ALIGNED
    segments = tuple(SegmentSpec(width, spec) for spec in problem.w13)
    first = LinearProblem(problem.hidden, segments, problem.dtype, problem.bias)
    return first, LinearProblem(width, (SegmentSpec(problem.hidden, problem.w2),), problem.dtype, problem.bias)


def experts_verdict(problem: MoEProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a mixture of experts on a platform, and at what cost."""
    refusal = refuse_mixture(problem, MOST_EXPERTS)
    if refusal is not None:
        return refusal
    for product in products(problem):
        refusal = refuse(product, platform)
        if refusal is not None:
            return refusal
    forms = forms_of(problem)
    row = _SLOWER * problem.top_k * sum(row_us(form) for form in forms)
    return Accepted(
        cost(problem, _CALL_US, sum(reading_us(form) for form in forms), row),
        casts=mixture_casts(problem, forms),
        extra_bytes=extra_bytes(problem, forms),
        notes=mixture_notes(forms),
    )


def forms_of(problem: MoEProblem, *, float8: bool = False) -> tuple[Form, Form]:
    """Return the forms of both products, for x in bfloat16 or in float8_e4m3fn."""
    first, second = products(problem)
    return form_of(first, float8=float8), form_of(second, float8=float8)


def cost(problem: MoEProblem, call_us: float, one_us: float, row_us: float) -> Cost:
    """
    Return what a call takes, given what reading one expert takes, and a row.

    Few rows take an expert each; of many, every expert has its share, and its weights are read once.
    """
    return Cost(call_us, problem.top_k * one_us + row_us, Cost(call_us + problem.experts * one_us, row_us))


def mixture_casts(problem: MoEProblem, forms: tuple[Form, Form]) -> tuple[Cast, ...]:
    """Return the roundings of both products, and of what they give."""
    both = zip(products(problem), forms, strict=True)
    what = dict.fromkeys(cast.what for product, form in both for cast in casts(product, form))
    return tuple(Cast(name, DTYPE) for name in (*what, "gate_up", "expert"))


def mixture_notes(forms: tuple[Form, Form]) -> tuple[str, ...]:
    """Return what a plan should show."""
    return tuple(dict.fromkeys(note for form in forms for note in notes(form)))


def extra_bytes(problem: MoEProblem, forms: tuple[Form, Form]) -> int:
    """Return what is held beyond the stored form: rows and inputs that fill up, those of biases, too."""
    extra = sum(bytes_held(form) for form in forms) - problem.stored_bytes // problem.experts
    if problem.bias:
        rows = sum(form.filled[0] for form in forms)
        extra += 2 * (rows - len(problem.w13) * problem.intermediate - problem.hidden)
    return max(0, problem.experts * extra)
