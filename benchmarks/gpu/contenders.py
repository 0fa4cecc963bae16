"""
Who is measured: what they hold of a layer, what they make of x beforehand, and the call that is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from benchmarks.gpu.cases import CUDA, LinearCase
from benchmarks.gpu.experts import ExpertCase, Routed
from quantplug.detect import detect
from quantplug.expertweights import PreparedExperts
from quantplug.kernel import Accepted
from quantplug.plugins import registry
from quantplug.weight import Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from benchmarks.gpu.cases import Case, Kind
    from quantplug.kernel import LinearKernel
    from quantplug.moekernel import Kernel, MoEKernel

Role = Literal["ours", "peer", "reference", "informative"]
"""A peer multiplies the same quantized weights; a reference holds another layer, an informative one does less work."""

MANY = 512
"""Rows from which on dequantizing at every call is worth measuring."""

MOST_ROWS = {
    "triton.wna16": 128, "triton.w8a8": 2048, "triton.wna16.dense": 0, "triton.w8a8.dense": 0,
    "marlin.w8.rows": 128, "marlin.w8.rows.dense": 0,
}  # fmt: skip
"""
Rows up to which kernels are, beyond which others are chosen: portable ones are far behind and take long to compile, and
what shares its weights with products in FP8 leaves many rows to those.
"""

_COMPILED_BY_PACKAGES = ("humming.", "deepgemm.")
"""What begins like this wraps a package that compiles for seconds, for each layer and range of rows."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a contender holds of a layer: tensors on the GPU, and plain facts."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, int]


class Contender(ABC):
    """One implementation. Stateless: it is made anew, by name, in every process."""

    name: str
    kind: Kind = "linear"
    role: Role = "peer"

    slow_to_compile = False
    """Whether its kernels take so long to compile that it has to begin first."""

    @abstractmethod
    def refuses(self, case: Any) -> str:
        """Return why it does not run a case, or ""."""

    @abstractmethod
    def prepare(self, case: Any) -> Held:
        """Return what it holds of the case's weights."""

    def concerns(self, case: Any) -> bool:
        """Return whether a format is any of its business; nobody is told of others."""
        return True

    def quantizes_x(self, case: Any) -> bool:
        """Return whether it multiplies x as the format permits, and not as it is."""
        return False

    def work(self, case: Case) -> Hashable:
        """
        Return what a call computes, as a key: what is alike is checked and measured once.

        Who leaves x as it is does the same for formats that differ only in what they permit about x.
        """
        return self.name, case.kind, case.layer, case.of_format.weight, self.quantizes_x(case)

    def ready(self, given: Any, case: Any) -> Any:
        """Return what the call takes in place of an input, made outside of the time that is measured."""
        return given

    @abstractmethod
    def call(self, given: Any, held: Held, case: Any) -> torch.Tensor:
        """Return y: what is timed."""

    def bound(self, given: Any, held: Held, case: Any) -> Callable[[], torch.Tensor]:
        """Return a call as a layer makes it, which has made beforehand what is the same every time."""
        return partial(self.call, given, held, case)

    def rows(self, asked: tuple[int, ...], case: Any) -> tuple[int, ...]:
        """Return the numbers of rows that are worth measuring."""
        return asked


class _Installed(Contender):
    """A kernel that is installed as a plugin, or that the core makes of one."""

    role = "ours"
    kernel: Kernel

    def refuses(self, case: Case) -> str:
        """Ask the kernel, then let it try itself out."""
        platform = detect()
        verdict = self.kernel.supports(case.problem, platform)  # type: ignore[arg-type]  # kernel and case are of a kind
        if not isinstance(verdict, Accepted):
            return verdict.reason
        refusal = self.kernel.probe(platform)
        return "" if refusal is None else refusal.reason

    def work(self, case: Case) -> Hashable:
        """What a kernel refuses is no work of its own."""
        accepts = isinstance(self.kernel.supports(case.problem, detect()), Accepted)  # type: ignore[arg-type]  # as above
        return super().work(case), accepts

    def quantizes_x(self, case: Case) -> bool:
        """As the kernel's verdict says."""
        verdict = self.kernel.supports(case.problem, detect())  # type: ignore[arg-type]  # as above
        return isinstance(verdict, Accepted) and verdict.quantizes_x


class Ours(_Installed):
    """A kernel for linear layers."""

    kernel: LinearKernel

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernel = registry().kernel(name).item
        self.slow_to_compile = name.startswith(_COMPILED_BY_PACKAGES)

    def prepare(self, case: LinearCase) -> Held:
        """Let the kernel prepare the layer."""
        with on_the_gpu():
            prepared = self.kernel.prepare(case.problem, [case.weight(CUDA)], [case.of_format.params()], CUDA)
        return Held(dict(prepared.tensors), dict(prepared.meta))

    def call(self, given: torch.Tensor, held: Held, case: LinearCase) -> torch.Tensor:
        """Run the layer."""
        return self.bound(given, held, case)()

    def bound(self, given: torch.Tensor, held: Held, case: LinearCase) -> Callable[[], torch.Tensor]:
        """As `QuantizedLinear` calls its kernel."""
        prepared = Prepared(self.kernel.layout_id, case.problem, held.tensors, held.facts)
        return partial(self.kernel.apply, given, prepared, None)

    def rows(self, asked: tuple[int, ...], case: LinearCase) -> tuple[int, ...]:
        """Leave out what nobody would choose by far."""
        least = MANY if self.name.endswith(".dense") else 0
        return tuple(rows for rows in asked if least <= rows <= MOST_ROWS.get(self.name, rows))


class OurExperts(_Installed):
    """A kernel for experts."""

    kind = "experts"
    kernel: MoEKernel

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernel = registry().moe_kernel(name).item

    def prepare(self, case: ExpertCase) -> Held:
        """Let the kernel prepare one expert after the other."""
        with on_the_gpu():
            prepared = self.kernel.prepare(case.problem, case.all_experts(CUDA), CUDA)
        return Held(dict(prepared.tensors), dict(prepared.meta))

    def call(self, given: Routed, held: Held, case: ExpertCase) -> torch.Tensor:
        """Run the layer."""
        prepared = PreparedExperts(self.kernel.layout_id, case.problem, held.tensors, held.facts)
        return self.kernel.apply(given.x, given.weights, given.ids, prepared)


def on_the_gpu() -> torch.device:
    """
    Return a context in which tensors are made on the GPU.

    A loader has weights on the CPU, where preparing all that is measured here would take minutes. What kernels do there
    are plain operators of torch, which give the same on a GPU.
    """
    return CUDA


def ours(kind: Kind, cases: list[Case]) -> list[str]:
    """
    Return the names of installed kernels for GPUs: those that accept any of some cases on this machine.

    Experts one after the other are left out: 128 of them take 256 launches.
    """
    known, platform = registry(), detect()
    kernels = known.kernels if kind == "linear" else known.moe_kernels
    return [
        name
        for name, provided in kernels.items()
        if not provided.item.traits.fallback
        and not name.startswith("loop.")
        and any(isinstance(provided.item.supports(case.problem, platform), Accepted) for case in cases)  # type: ignore[arg-type]  # kernels and cases are of a kind
    ]
