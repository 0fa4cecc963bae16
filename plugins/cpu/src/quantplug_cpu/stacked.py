"""
The experts of a layer in the layout of a linear kernel, one behind the other: every tensor has a leading axis E.

One product of all experts is a `Prepared` whose tensors are stacks; one expert's is the same with views into them. So
packing, products and ways back are those of the linear kernels, and a layer is a handful of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantplug.expertweights import ExpertWeights, PreparedExperts
from quantplug.weight import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.kernel import LinearKernel
    from quantplug.moe import MoEProblem
    from quantplug.spec import LinearProblem

Runs = Sequence[tuple[int, int]]
"""Experts, each with the number of rows that chose it."""

_SHARED = "columns.0"
"""The slots of inputs: the same for all experts where none has an order of its own."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Stack(Prepared):
    """
    One product of all experts.

    Attributes:
        views: each expert's tensors by name. To make one takes as long as a small product, so they are made once.
    """

    views: Mapping[str, Sequence[torch.Tensor] | torch.Tensor]

    @classmethod
    def of(cls, prepared: Prepared) -> Stack:
        """Return a stack of the same tensors, with views of every expert."""
        views = {name: list(tensor) for name, tensor in prepared.tensors.items() if name != _SHARED}
        return cls(prepared.layout_id, prepared.problem, prepared.tensors, prepared.meta, views=views)

    def one(self, expert: int) -> Prepared:
        """Return one expert's part."""
        tensors = {name: views[expert] for name, views in self.views.items() if name != _SHARED}
        if _SHARED in self.tensors:
            tensors[_SHARED] = self.tensors[_SHARED]
        return Prepared(self.layout_id, self.problem, tensors, self.meta)


def stacks(prepared: PreparedExperts) -> tuple[Stack, Stack]:
    """Return both products of a layer, also where somebody has made its parts anew from their tensors."""
    first, second = (part if isinstance(part, Stack) else Stack.of(part) for part in prepared.parts)
    return first, second


def joined(products: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all experts, one below the other, without a copy where there is one expert."""
    return products[0] if len(products) == 1 else torch.cat(products)


def prepare(
    problem: MoEProblem,
    products: tuple[LinearProblem, LinearProblem],
    experts: Iterable[ExpertWeights],
    linear: LinearKernel,
    layout_id: str,
    out: PreparedExperts | None,
) -> PreparedExperts:
    """
    Return both products of all experts as `parts`; biases, if any, are `b13` `[E, I or 2I]` and `b2` `[E, H]`.

    The first expert is prepared by itself, to see what memory a layer takes; every other goes straight into its place.

    Raises:
        ValueError: there are not E experts, or one has a tensor whose shape or dtype is not what the contract says.
    """
    first, second = products
    result, count, device = out, 0, torch.device("cpu")
    for number, expert in enumerate(experts):
        if number == problem.experts:
            raise ValueError(f"more than {problem.experts} experts are given")
        places = (None, None) if result is None else [part.one(number) for part in stacks(result)]
        stored = (None,) * len(expert.w13)
        one = linear.prepare(first, expert.w13, stored, device, places[0])
        two = linear.prepare(second, (expert.w2,), (None,), device, places[1])
        if result is None:
            result = _allocate(problem, (one, two), layout_id)
        _write_biases(expert, number, problem, result)
        count += 1
    if result is None or count != problem.experts:
        raise ValueError(f"{count} experts are given, not {problem.experts}")
    return result


def dequantize(prepared: PreparedExperts, expert: int, linear: LinearKernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one expert's values, float32 `[I or 2I, H]` and `[H, I]`."""
    first, second = (linear.dequantize(part.one(expert), torch.float32) for part in stacks(prepared))
    return first, second


def unprepare(prepared: PreparedExperts, expert: int, linear: LinearKernel) -> ExpertWeights:
    """
    Return one expert's canonical weights.

    Raises:
        NotImplementedError: the linear kernel has no way back, or rounded scales on the way in.
    """
    first, second = (linear.unprepare(part.one(expert)) for part in stacks(prepared))
    return ExpertWeights(first, second[0])


def _allocate(problem: MoEProblem, ones: tuple[Prepared, Prepared], layout_id: str) -> PreparedExperts:
    """Return memory for all experts, with the first one in its place."""
    parts = []
    for one in ones:
        tensors = {}
        for name, tensor in one.tensors.items():
            tensors[name] = tensor if name == _SHARED else tensor.new_empty(problem.experts, *tensor.shape)
        stack = Stack.of(Prepared(one.layout_id, one.problem, tensors, one.meta))
        for name, views in stack.views.items():
            views[0].copy_(one.tensors[name])
        parts.append(stack)
    biases: dict[str, torch.Tensor] = {}
    if problem.bias:
        dtype = getattr(torch, problem.dtype)
        for name, one in zip(("b13", "b2"), ones, strict=True):
            biases[name] = torch.empty(problem.experts, one.problem.out_features, dtype=dtype)
    return PreparedExperts(layout_id, problem, biases, parts=tuple(parts))


def _write_biases(expert: ExpertWeights, number: int, problem: MoEProblem, result: PreparedExperts) -> None:
    there = expert.b2 is not None and len(expert.b13) == len(problem.w13)
    if there != problem.bias:
        raise ValueError(f"expert {number}: biases are {'there' if there else 'missing'}")
    if expert.b2 is not None and problem.bias:
        torch.cat([bias.to(result.tensors["b13"].dtype) for bias in expert.b13], out=result.tensors["b13"][number])
        result.tensors["b2"][number] = expert.b2
