"""
Experts that are measured: the layer of a model that people serve, from given choices of its router to y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.gpu.cases import Case, ends
from benchmarks.gpu.formats import EXPERT_FORMATS, made_weight, stored_bytes
from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, MoEProblem

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = (1, 16, 256, 4096)
QUICK_TOKENS = (1, 256)

_COMPARED = 16


class Sizes(NamedTuple):
    """E, T, H and I."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


LAYERS = {"Qwen3-30B-A3B": Sizes(128, 8, 2048, 768), "Mixtral 8x7B": Sizes(8, 2, 4096, 14336)}
QUICK_LAYERS = ("Qwen3-30B-A3B",)


class Routed(NamedTuple):
    """x `[M, H]`, the router's weights float32 `[M, T]`, and ids int32 `[M, T]`, distinct in each row."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertCase(Case):
    """All experts of one layer: SiLU of gate, times up, then down."""

    kind = "experts"

    format: str
    model: str

    @property
    def layer(self) -> str:
        """The model."""
        return self.model

    @property
    def sizes(self) -> Sizes:
        """E, T, H and I."""
        return LAYERS[self.model]

    @property
    def problem(self) -> MoEProblem:
        """Every projection in the same format."""
        spec = self.of_format.weight
        return MoEProblem(*self.sizes, (spec, spec), spec, ExpertFunction(), "bfloat16", activation=self.permission)

    @property
    def weights(self) -> int:
        """Of all experts."""
        return self.sizes.experts * self.weights_of_one

    @property
    def weights_of_one(self) -> int:
        """Three projections."""
        return 3 * self.sizes.hidden * self.sizes.intermediate

    def expert(self, number: int, device: torch.device) -> ExpertWeights:
        """Return one expert's weights, the same every time."""
        _, _, hidden, intermediate = self.sizes
        spec = self.of_format.weight
        gate, up = (made_weight(spec, intermediate, hidden, 3 * number + projection, device) for projection in range(2))
        down = made_weight(spec, hidden, intermediate, 3 * number + 2, device)
        params = self.of_format.params()
        return ExpertWeights((gate, up), down, a13=(params, params), a2=params)

    def all_experts(self, device: torch.device) -> Iterator[ExpertWeights]:
        """Yield the experts in their order, each made when it is asked for."""
        return (self.expert(number, device) for number in range(self.sizes.experts))

    def inputs(self, rows: int, device: torch.device) -> list[Routed]:
        """Return several, whose choices differ: so many that few rows do not find their experts in a cache."""
        generator = torch.Generator(device).manual_seed(rows)
        found = []
        for ids in _choices(rows, self.sizes.experts, self.sizes.top_k):
            x = torch.randn(rows, self.sizes.hidden, generator=generator, device=device).to(torch.bfloat16)
            scores = torch.rand(rows, self.sizes.top_k, generator=generator, device=device) + 0.5
            found.append(Routed(x, scores / scores.sum(1, keepdim=True), ids.to(device)))
        return found

    def read_bytes(self, rows: int) -> float:
        """Those of the experts that are chosen."""
        _, _, hidden, intermediate = self.sizes
        spec = self.of_format.weight
        one = 2 * stored_bytes(spec, intermediate, hidden) + stored_bytes(spec, hidden, intermediate)
        routings = _choices(rows, self.sizes.experts, self.sizes.top_k)
        return one * float(sum(ids.unique().numel() for ids in routings)) / len(routings)

    def operations(self, rows: int) -> float:
        """Two per choice and weight of an expert."""
        return 2.0 * rows * self.sizes.top_k * self.weights_of_one

    def right(self, given: Routed, *, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one expert after the other."""
        some = ends(given.x.shape[0], _COMPARED).to(given.x.device)
        x, weights, ids = (tensor[some] for tensor in given)

        def entering(values: torch.Tensor) -> torch.Tensor:
            return self.of_format.as_permitted(values) if quantized else values.to(torch.float32)

        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in ids.unique().tolist():
            rows, slots = (ids == number).nonzero(as_tuple=True)
            expert = self.expert(number, x.device)
            gate, up = (entering(x[rows]) @ part.dequantize(torch.float32).t() for part in expert.w13)
            hidden = torch.nn.functional.silu(gate) * up
            y[rows] += weights[rows, slots, None] * (entering(hidden) @ expert.w2.dequantize(torch.float32).t())
        return some, y


def expert_cases(formats: list[str], *, quick: bool) -> list[Case]:
    """Return the experts in some formats, format by format."""
    wanted = [kind for kind in formats if kind in EXPERT_FORMATS]
    return [ExpertCase(kind, model) for kind in wanted for model in (QUICK_LAYERS if quick else LAYERS)]


@cache
def _choices(rows: int, experts: int, top_k: int) -> list[torch.Tensor]:
    """Return several routings, int32 `[M, T]`: uniform and random."""
    generator = torch.Generator().manual_seed(rows)
    count = 16 if rows <= 16 else 4 if rows <= 1024 else 2
    return [torch.rand(rows, experts, generator=generator).topk(top_k, 1).indices.to(torch.int32) for _ in range(count)]
