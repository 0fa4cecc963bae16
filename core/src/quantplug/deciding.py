"""
The kernel decisions of one plan: each distinct problem is put to everyone once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.choices import bytes_held
from quantplug.kernel import Accepted
from quantplug.select import kernels_for, select

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.inventory import ModuleInfo
    from quantplug.kernel import Rejected
    from quantplug.moe import MoEProblem
    from quantplug.plan import Decision
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Registry
    from quantplug.spec import LinearProblem
    from quantplug.timings import Timings


class Decider:
    """Decides problems; equal ones under equal wishes are decided once."""

    def __init__(
        self,
        platform: Platform,
        policy: Policy,
        registry: Registry,
        probes: Mapping[str, Rejected | None],
        timings: Timings,
    ) -> None:
        self._platform = platform
        self._policy = policy
        self._registry = registry
        self._probes = probes
        self._timings = timings
        self._decided: dict[object, int] = {}
        self.decisions: list[Decision] = []
        """The distinct decisions so far."""
        self.warnings: list[str] = []
        """About layers that run on a kernel of the last resort."""

    def decide(self, problem: LinearProblem | MoEProblem, module: ModuleInfo) -> int:
        """
        Return the number of the decision about a problem.

        Raises:
            PlanError: as `select`.
        """
        wishes = tuple(rule for rule in self._policy.rules if rule.concerns(module))
        key = (problem, wishes)
        if key not in self._decided:
            decision = select(
                problem, module, self._platform, self._registry, self._policy, self._probes, self._timings
            )
            self._decided[key] = len(self.decisions)
            self.decisions.append(decision)
            self._warn_fallback(problem, module, decision)
        return self._decided[key]

    def memory(self, problem: LinearProblem | MoEProblem, decision: int) -> int:
        """Return the estimated bytes of a layer once it is prepared."""
        chosen = self.decisions[decision]
        return bytes_held(problem, next(c for c in chosen.candidates if c.kernel == chosen.kernel))

    def _warn_fallback(self, problem: LinearProblem | MoEProblem, module: ModuleInfo, decision: Decision) -> None:
        if kernels_for(problem, self._registry)[decision.kernel].item.traits.fallback:
            others = "; ".join(
                f"{c.kernel}: {c.verdict.reason}" for c in decision.candidates if not isinstance(c.verdict, Accepted)
            )
            self.warnings.append(
                f"{module.path} and layers like it run on the slow {decision.kernel} kernel"
                + (f" ({others})" if others else " (no other kernel is installed)")
            )
