"""
A call of routed experts: rows are put into the order of their experts once, every step that does not depend on the
expert is taken once for all of them, and what is left for each active expert are two products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.expertfunction import between
from quantplug_cpu import product, quantized, rowwise, whole
from quantplug_cpu.stacked import stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantplug.expertweights import PreparedExperts
    from quantplug_cpu.stacked import Runs, Stack

    Product = Callable[[torch.Tensor, Runs, Stack, torch.Tensor | None], torch.Tensor]

_MOST_ELEMENTS = 1 << 18
"""
Elements of the widest temporary of experts that are run together: 1 MB in float32. What is larger is memory that is new
to the process at every call, which costs more to touch than sharing a step saves. A call of more rows takes several
turns, none of which splits an expert's rows, so that each weight is still read once.
"""


def run(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
    linear: str,
) -> torch.Tensor:
    """
    Return y `[M, H]`, summed in float32.

    Args:
        x: `[M, H]`.
        topk_weights: float32 `[M, T]`.
        topk_ids: integer `[M, T]`; those of no expert here add nothing.
        prepared: what `stacked.prepare` returned.
        expert_map: integer `[E_global]` or None.
        linear: name of the kernel that prepared the stacks.
    """
    problem = prepared.problem
    first, second = stacks(prepared)
    b13, b2 = prepared.tensors.get("b13"), prepared.tensors.get("b2")
    weights = topk_weights.reshape(-1)
    wide = max(first.problem.out_features, problem.hidden)
    y = torch.zeros(x.shape[0], problem.hidden)
    for runs, slots in _batches(_assigned(topk_ids, problem.experts, expert_map), _MOST_ELEMENTS // wide):
        places = torch.tensor(slots)
        factors = weights.index_select(0, places).unsqueeze(1)
        rows = places.div(problem.top_k, rounding_mode="floor")
        taken = x.index_select(0, rows)
        if problem.router_weight_on_input:
            taken = (taken * factors).to(x.dtype)
        inner = between(_product(linear, first)(taken, runs, first, b13), problem.function)
        output = _product(linear, second)(inner, runs, second, b2).to(torch.float32)
        if not problem.router_weight_on_input:
            output.mul_(factors)
        y.index_add_(0, rows, output)
    return y.to(x.dtype)


def _assigned(topk_ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None) -> dict[int, list[int]]:
    """
    Return the slots of `topk_ids`, counted row by row, that name each expert here.

    Only experts with rows are in it, in the order in which they are named first. Counting on the host takes 0.1 us a
    slot; sorting on torch's side takes a dozen operators however few slots there are.
    """
    if expert_map is not None:
        known = (topk_ids >= 0) & (topk_ids < len(expert_map))
        topk_ids = torch.where(known, expert_map[topk_ids.clamp(0, len(expert_map) - 1).long()], -1)
    slots: dict[int, list[int]] = {}
    for slot, expert in enumerate(topk_ids.reshape(-1).tolist()):
        if expert in slots:
            slots[expert].append(slot)
        elif 0 <= expert < experts:
            slots[expert] = [slot]
    return slots


def _batches(slots: dict[int, list[int]], most: int) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
    """Yield `(expert, rows)` and the slots of these rows, of as many experts at once as have up to `most` rows."""
    runs: list[tuple[int, int]] = []
    taken: list[int] = []
    for expert, mine in slots.items():
        if runs and len(taken) + len(mine) > most:
            yield runs, taken
            runs, taken = [], []
        runs.append((expert, len(mine)))
        taken += mine
    if runs:
        yield runs, taken


def _product(linear: str, stack: Stack) -> Product:
    """Return what multiplies rows with the experts of a stack."""
    match linear:
        case "cpu.dense":
            return whole.multiply_stacked
        case "cpu.w8a8":
            return quantized.multiply_stacked
    return product.multiply_stacked if stack.meta["planes"] else rowwise.multiply_stacked
