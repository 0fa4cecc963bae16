"""
A layer of experts as one operator: torch.compile cannot follow rows to their experts, and need not.

Outside of compiled models nothing goes through it. An operator takes tensors and numbers only; what else a layer is
(the problem, how its weights are laid out) is kept here, once for all layers of a kind, and goes by a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from quantplug.expertweights import PreparedExperts
from quantplug_cpu.ops import register
from quantplug_cpu.routed import run
from quantplug_cpu.stacked import Stack

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.spec import LinearProblem
    from quantplug.weight import Prepared


@dataclass(frozen=True, slots=True)
class _Part:
    """What a stack is besides its tensors."""

    layout_id: str
    problem: LinearProblem
    names: tuple[str, ...]
    meta: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, stack: Prepared) -> _Part:
        return cls(stack.layout_id, stack.problem, tuple(sorted(stack.tensors)), tuple(sorted(stack.meta.items())))

    def stack(self, tensors: list[torch.Tensor]) -> Stack:
        named = dict(zip(self.names, tensors, strict=True))
        # Here no view outlives the call; a stack's own index makes those of the experts that have rows.
        return Stack(self.layout_id, self.problem, named, dict(self.meta), views=named)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a layer is besides its tensors."""

    linear: str
    layout_id: str
    problem: MoEProblem
    first: _Part
    second: _Part

    @property
    def number(self) -> int:
        """The same in every process, so that a layer from another one is not taken for something else."""
        return int.from_bytes(sha256(repr(self).encode()).digest()[:7])


_KINDS: dict[int, _Kind] = {}


def numbered(prepared: PreparedExperts, linear: str) -> PreparedExperts:
    """
    Return a layer that knows its number.

    Args:
        prepared: stacks.
        linear: name of the kernel that prepared them.
    """
    first, second = prepared.parts
    kind = _Kind(linear, prepared.layout_id, prepared.problem, _Part.of(first), _Part.of(second))
    _KINDS[kind.number] = kind
    return replace(prepared, meta={"kind": kind.number})


def call(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `run` returns, by one operator."""
    first, second = ([part.tensors[name] for name in sorted(part.tensors)] for part in prepared.parts)
    b13, b2 = prepared.tensors.get("b13"), prepared.tensors.get("b2")
    return _experts(x, topk_weights, topk_ids, expert_map, first, second, b13, b2, prepared.meta["kind"])


def _run(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    number: int,
) -> torch.Tensor:
    kind = _KINDS[number]
    biases = {} if b13 is None or b2 is None else {"b13": b13, "b2": b2}
    parts = (kind.first.stack(first), kind.second.stack(second))
    prepared = PreparedExperts(kind.layout_id, kind.problem, biases, parts=parts)
    return run(x, topk_weights, topk_ids, prepared, expert_map, kind.linear)


def _fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_experts = register(
    "experts",
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor[] first, Tensor[] second, "
    "Tensor? b13, Tensor? b2, int kind) -> Tensor",
    _run,
    _fake,
)
