"""
What is measured: a layer in one number format. Linear layers are here, experts in `experts.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from benchmarks.gpu.formats import FORMATS, Format, made_weight, stored_bytes
from quantplug.activations import read_activation
from quantplug.spec import LinearProblem, SegmentSpec

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.spec import ActivationSpec
    from quantplug.weight import Weight

Kind = Literal["linear", "experts"]

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
QUICK_SHAPES = ((4096, 4096), (4096, 14336))
ROWS = (1, 4, 16, 32, 64, 128, 512, 2048, 8192)
QUICK_ROWS = (1, 16, 128, 2048)

CUDA = torch.device("cuda")
"""Where everything runs."""

_COMPARED = 32
"""Rows at both ends that are held against what is right."""


class Case(ABC):
    """
    A layer in one number format, x and y in bfloat16; hashable, and as light as its name.

    Attributes:
        kind: of layer.
        format: name of the format.
    """

    __slots__ = ()

    kind: ClassVar[Kind]
    format: str

    @property
    def of_format(self) -> Format:
        """The format."""
        return FORMATS[self.format]

    @property
    def permission(self) -> ActivationSpec | None:
        """What kernels are told about x."""
        return read_activation(self.of_format.activation, self.format)

    @property
    @abstractmethod
    def layer(self) -> str:
        """The layer as tables spell it."""

    @property
    @abstractmethod
    def problem(self) -> LinearProblem | MoEProblem:
        """What kernels are asked about."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Weights of the layer."""

    @abstractmethod
    def inputs(self, rows: int, device: torch.device) -> list[Any]:
        """Return what calls are given, in turns."""

    @abstractmethod
    def read_bytes(self, rows: int) -> float:
        """Return the bytes of weights that a call must read, on average over its inputs."""

    @abstractmethod
    def operations(self, rows: int) -> float:
        """Return the products and sums of a call."""

    @abstractmethod
    def right(self, given: Any, *, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return numbers of some rows, and float32 y of those.

        Args:
            given: one of `inputs`.
            quantized: whether what enters a product is quantized as the format permits.
        """


@dataclass(frozen=True, slots=True)
class LinearCase(Case):
    """One linear layer: y `[M, N]` = x `[M, K]` W^T."""

    kind = "linear"

    format: str
    n: int
    k: int

    @property
    def layer(self) -> str:
        """N and K."""
        return f"{self.n} x {self.k}"

    @property
    def problem(self) -> LinearProblem:
        """One segment."""
        segments = (SegmentSpec(self.n, self.of_format.weight),)
        return LinearProblem(self.k, segments, "bfloat16", activation=self.permission)

    @property
    def weights(self) -> int:
        """N times K."""
        return self.n * self.k

    def weight(self, device: torch.device) -> Weight:
        """Return the layer's weight, the same every time."""
        return made_weight(self.of_format.weight, self.n, self.k, self.n + self.k, device)

    def inputs(self, rows: int, device: torch.device) -> list[torch.Tensor]:
        """Return one x `[M, K]`, standard normal."""
        generator = torch.Generator(device).manual_seed(rows)
        return [torch.randn(rows, self.k, generator=generator, device=device).to(torch.bfloat16)]

    def read_bytes(self, rows: int) -> float:
        """All of them, once."""
        return stored_bytes(self.of_format.weight, self.n, self.k)

    def operations(self, rows: int) -> float:
        """Two per row and weight."""
        return 2.0 * rows * self.weights

    def right(self, given: torch.Tensor, *, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply with what the weight stands for."""
        some = ends(given.shape[0], _COMPARED).to(given.device)
        x = given[some]
        values = self.weight(given.device).dequantize(torch.float32)
        return some, (self.of_format.as_permitted(x) if quantized else x.to(torch.float32)) @ values.t()


def ends(rows: int, count: int) -> torch.Tensor:
    """Return the numbers of the first and the last rows, `count` each."""
    return torch.tensor(sorted({*range(min(rows, count)), *range(max(0, rows - count), rows)}))


def linear_cases(formats: list[str], *, quick: bool) -> list[Case]:
    """Return the linear layers in some formats, format by format."""
    return [LinearCase(kind, *shape) for kind in formats for shape in (QUICK_SHAPES if quick else SHAPES)]
