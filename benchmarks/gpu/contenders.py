"""
Who is measured: what they hold of a weight, what they make of x beforehand, and the call that is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import FORMATS, Case, on_cpu
from quantplug.detect import detect
from quantplug.kernel import Accepted
from quantplug.plugins import registry
from quantplug.weight import Prepared

if TYPE_CHECKING:
    from quantplug.kernel import LinearKernel


@dataclass(frozen=True, slots=True)
class Held:
    """What a contender holds of a layer: tensors on the GPU, and plain facts."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, int]


class Contender(ABC):
    """One implementation. Stateless: it is made anew, by name, in every process."""

    name: str
    peer = True
    """Whether it is somebody else's, to be compared with."""
    informative = False
    """Whether it leaves out a part of the work (x is given in 8 bits), and so does not count."""

    quick_to_prepare = True
    """Whether preparing takes milliseconds, so that it is simply done again."""

    @abstractmethod
    def refuses(self, case: Case) -> str:
        """Return why it does not run a case, or ""."""

    @abstractmethod
    def prepare(self, case: Case) -> Held:
        """Return what it holds of the case's weight."""

    def concerns(self, case: Case) -> bool:
        """Return whether a format is any of its business; nobody is told of others."""
        return True

    def quantizes_x(self, case: Case) -> bool:
        """Return whether it multiplies x as the format permits, and not as it is."""
        return False

    def ready(self, x: torch.Tensor, case: Case) -> Any:
        """Return what the call takes in place of x, made outside of the time that is measured."""
        return x

    @abstractmethod
    def call(self, x: Any, held: Held, case: Case) -> torch.Tensor:
        """Return y `[M, N]`: what is timed."""

    def rows(self, asked: tuple[int, ...], case: Case) -> tuple[int, ...]:
        """Return the numbers of rows that are worth measuring."""
        return asked


class Ours(Contender):
    """A kernel that is installed as a plugin, or that the core makes of one."""

    peer = False
    quick_to_prepare = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernel: LinearKernel = registry().kernel(name).item

    def refuses(self, case: Case) -> str:
        """Ask the kernel, then let it try itself out."""
        platform = detect()
        verdict = self.kernel.supports(case.problem, platform)
        if not isinstance(verdict, Accepted):
            return verdict.reason
        refusal = self.kernel.probe(platform)
        return "" if refusal is None else refusal.reason

    def quantizes_x(self, case: Case) -> bool:
        """As the kernel's verdict says."""
        verdict = self.kernel.supports(case.problem, detect())
        return isinstance(verdict, Accepted) and verdict.quantizes_x

    def prepare(self, case: Case) -> Held:
        """Let the kernel prepare the layer as a loader does."""
        device = torch.device("cuda")
        weight = on_cpu(case.weight(device))
        prepared = self.kernel.prepare(case.problem, [weight], [case.activation()], device)
        return Held(dict(prepared.tensors), dict(prepared.meta))

    def call(self, x: torch.Tensor, held: Held, case: Case) -> torch.Tensor:
        """Run the layer."""
        return self.kernel.apply(x, Prepared(self.kernel.layout_id, case.problem, held.tensors, held.facts), None)

    def rows(self, asked: tuple[int, ...], case: Case) -> tuple[int, ...]:
        """Leave out what nobody would choose by far: the portable kernel for very many rows, dequantizing for few."""
        if self.name == "triton.wna16":
            return tuple(rows for rows in asked if rows <= 2048)
        return tuple(rows for rows in asked if rows >= 2048) if self.name == "triton.wna16.dense" else asked


def ours() -> list[Contender]:
    """Return the installed kernels for GPUs: those that accept any of the formats on this machine."""
    platform = detect()
    problems = [Case(name, 4096, 4096).problem for name in FORMATS]
    found: list[Contender] = []
    for name, provided in registry().kernels.items():
        kernel = provided.item
        accepts = any(isinstance(kernel.supports(problem, platform), Accepted) for problem in problems)
        if accepts and not kernel.traits.fallback:
            found.append(Ours(name))
    return found
