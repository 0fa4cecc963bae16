"""
What a plan takes for a layer, without any measurement or wish: kernels of one layout, and of two where memory allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.asking import probe
from quantplug.detect import detect
from quantplug.errors import PlanError
from quantplug.inventory import ModuleInfo
from quantplug.plugins import registry
from quantplug.policy import Policy
from quantplug.secondlayout import second_layout
from quantplug.select import kernels_for, select

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Case
    from quantplug.plan import Choice


@dataclass(frozen=True, slots=True)
class Chosen:
    """
    The kernels of a layer by numbers of rows.

    Attributes:
        one: of one layout.
        two: of two layouts, where a second one gains, else those of one.
    """

    one: tuple[Choice, ...] = ()
    two: tuple[Choice, ...] = ()


def chosen(case: Case) -> Chosen:
    """Return what a plan takes for a layer on this machine; nothing where no kernel runs it."""
    known, platform, problem = registry(), detect(), case.problem
    kernels = kernels_for(problem, known)
    probes = {name: probe(provided.item, platform) for name, provided in kernels.items()}
    try:
        decision = select(problem, ModuleInfo("layer", case.kind), platform, known, Policy(), probes)
    except PlanError:
        return Chosen()
    second = second_layout(problem, decision, platform, known)
    return Chosen(decision.choices, decision.choices if second is None else second.decision.choices)


def serving(choices: tuple[Choice, ...], rows: int) -> str:
    """Return the kernel that serves a number of rows, or ""."""
    for choice in choices:
        if choice.max_rows is None or rows <= choice.max_rows:
            return choice.kernel
    return ""
