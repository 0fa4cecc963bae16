"""
From experts' canonical weights to what the kernel for experts reads.

Gate and up are one matrix whose rows take turns, gate first, so that a tile of their product holds both. With act-order
each has an order of inputs of its own, and they are two parts. The tensors of product p, "13" or "2", for E experts of
P parts, N rows filled up to R (a multiple of 64) and S slots, are those of `prepare.py` in stacks:

- `codes.p`: uint8 `[E, P, R / 64, S / F, 64]`;
- `scales.p`: `[E, P, G, C]`, `zeros.p` likewise; columns of gate and up take turns, too;
- `columns.p`: int32 `[E, P, S]` with act-order, `[S]` where groups are filled up, for all experts alike;
- `factor.p`: float32, the global scale of each projection: `[E, 2]` or `[E, 1]`;
- `b13`, `b2`: biases in the problem's dtype, `[E, N]`; of gate and up in turns, or one part after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantplug.expertweights import ExpertWeights, PreparedExperts
from quantplug.spec import PerGroup
from quantplug.weight import Weight
from quantplug_triton.prepare import held_scales, in_order, is_rounded, order_of, pack_codes, rows_per_scale
from quantplug_triton.unpack import unpack_codes, unpack_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from quantplug.moe import MoEProblem
    from quantplug.spec import WeightSpec
    from quantplug_triton.slots import Slots


@dataclass(frozen=True, slots=True)
class Product:
    """
    One product of every expert.

    Attributes:
        name: "13" or "2", which ends the names of its tensors.
        spec: contract of its projections.
        inputs: of a row.
        outputs: of a projection.
        projections: 2 for gate and up, else 1.
    """

    name: str
    spec: WeightSpec
    inputs: int
    outputs: int
    projections: int

    @property
    def parts(self) -> int:
        """Matrices that are held apart."""
        return self.projections if self.spec.act_order else 1

    @property
    def turns(self) -> int:
        """Projections whose rows take turns in a matrix."""
        return self.projections // self.parts


def products(problem: MoEProblem) -> tuple[Product, Product]:
    """Return both products of a layer."""
    return (
        Product("13", problem.w13[0], problem.hidden, problem.intermediate, len(problem.w13)),
        Product("2", problem.w2, problem.intermediate, problem.hidden, 1),
    )


def prepare_experts(
    problem: MoEProblem,
    experts: Iterable[ExpertWeights],
    device: torch.device,
    layout_id: str,
    out: PreparedExperts | None,
) -> PreparedExperts:
    """
    Return the tensors above; `out` is overwritten in place.

    Raises:
        ValueError: there are not E experts, one has biases where none belong or none where they do, or act-order fills
            a group with more inputs than `out` has slots for.
    """
    stacks = [_Stack(product, problem.experts, device, out) for product in products(problem)]
    biases: dict[str, torch.Tensor] = {} if out is None else {n: out.tensors[n] for n in ("b13", "b2") if problem.bias}
    if problem.bias and out is None:
        dtype = getattr(torch, problem.dtype)
        for stack in stacks:
            rows = stack.product.projections * stack.product.outputs
            biases[f"b{stack.product.name}"] = torch.empty(problem.experts, rows, dtype=dtype, device=device)
    count = 0
    for number, expert in enumerate(experts):
        if number == problem.experts:
            raise ValueError(f"more than {problem.experts} experts are given")
        if (expert.b2 is not None and len(expert.b13) == len(problem.w13)) != problem.bias:
            raise ValueError(f"expert {number}: biases are {'missing' if problem.bias else 'there'}")
        for stack, weights in zip(stacks, (expert.w13, (expert.w2,)), strict=True):
            stack.write(number, weights)
        if expert.b2 is not None:
            turns = stacks[0].product.turns
            biases["b13"][number] = torch.stack(expert.b13, dim=1 if turns == 2 else 0).reshape(-1)
            biases["b2"][number] = expert.b2
        count += 1
    if count != problem.experts:
        raise ValueError(f"{count} experts are given, not {problem.experts}")
    if out is not None:
        return out
    tensors, meta = dict(biases), {"rounded": int(any(stack.rounded for stack in stacks))}
    for stack in stacks:
        tensors |= {f"{name}.{stack.product.name}": tensor for name, tensor in stack.tensors.items()}
        meta |= {f"{name}.{stack.product.name}": number for name, number in stack.meta.items()}
    return PreparedExperts(layout_id, problem, tensors, meta)


def weights_of(prepared: PreparedExperts, expert: int) -> ExpertWeights:
    """Return one expert's canonical weights as they are held, without biases."""
    found = []
    for product in products(prepared.problem):
        ending = f".{product.name}"
        tensors = {name.removesuffix(ending): t for name, t in prepared.tensors.items() if name.endswith(ending)}
        meta = {name.removesuffix(ending): n for name, n in prepared.meta.items() if name.endswith(ending)}
        found.append([_weight(product, tensors, meta, expert, number) for number in range(product.projections)])
    return ExpertWeights(tuple(found[0]), found[1][0])


class _Stack:
    """One product's tensors, which are written expert by expert."""

    def __init__(self, product: Product, experts: int, device: torch.device, out: PreparedExperts | None) -> None:
        self.product = product
        self.rounded = False
        self.tensors: dict[str, torch.Tensor] = {}
        self.meta: dict[str, int] = {}
        self._experts, self._device, self._fixed = experts, device, out is not None
        # Slots of a group of inputs, with act-order: all experts have the same, whatever order they have.
        self._least = 0
        if product.spec.act_order and isinstance(product.spec.granularity, PerGroup):
            self._least = product.spec.granularity.size
        if out is not None:
            ending = f".{product.name}"
            self.tensors = {n.removesuffix(ending): t for n, t in out.tensors.items() if n.endswith(ending)}
            self.meta = {n.removesuffix(ending): number for n, number in out.meta.items() if n.endswith(ending)}
            self._least = self.meta["chunk"] * self.meta["per_group"]

    def write(self, expert: int, weights: Sequence[Weight]) -> None:
        """Put one expert's projections into their places."""
        self.rounded = self.rounded or any(is_rounded(weight) for weight in weights)
        for part in range(self.product.parts):
            matrix = weights if self.product.turns > 1 else weights[part : part + 1]
            packed, slots = _pack(matrix, self._least)
            if self.tensors and slots.chunk * slots.per_group > self.meta["chunk"] * self.meta["per_group"]:
                self._widen(slots, expert * self.product.parts + part)
            if not self.tensors:
                self._allocate(packed, slots, matrix[0])
            self._put(packed, expert, part)

    def _allocate(self, packed: Mapping[str, torch.Tensor], slots: Slots, like: Weight) -> None:
        for name, tensor in packed.items():
            shape: tuple[int, ...] = (self._experts, self.product.parts, *tensor.shape)
            if name == "factor":
                shape = (self._experts, self.product.projections)
            elif name == "columns" and not self.product.spec.act_order:
                shape = tuple(tensor.shape)
            self.tensors[name] = torch.empty(shape, dtype=tensor.dtype, device=self._device)
        self.meta = {
            "chunk": slots.chunk,
            "per_group": slots.per_group,
            "rows_per_scale": rows_per_scale([like], self.product.outputs),
        }

    def _put(self, packed: Mapping[str, torch.Tensor], expert: int, part: int) -> None:
        for name, tensor in packed.items():
            held = self.tensors[name]
            if name == "factor":
                held[expert, part : part + len(tensor)] = tensor
            elif name == "columns" and held.dim() == 1:
                held.copy_(tensor)
            else:
                held[expert, part].copy_(tensor)

    def _widen(self, slots: Slots, count: int) -> None:
        """Lay the first `count` matrices out anew, for groups of more inputs than any of them had."""
        if self._fixed:
            raise ValueError(
                f"a group of act-order has {slots.chunk * slots.per_group} slots, and the weights to be overwritten "
                f"have {self.meta['chunk'] * self.meta['per_group']}"
            )
        old, meta = self.tensors, self.meta
        self.tensors, self._least = {}, slots.chunk * slots.per_group
        for number in range(count):
            expert, part = divmod(number, self.product.parts)
            weight = _weight(self.product, old, meta, expert, part)
            packed, _ = _pack([weight], self._least)
            if not self.tensors:
                self._allocate(packed, slots, weight)
            self._put(packed, expert, part)


def _pack(matrix: Sequence[Weight], least: int) -> tuple[dict[str, torch.Tensor], Slots]:
    """Return the tensors of projections whose rows take turns, and how their inputs are laid out."""
    weight = matrix[0]
    order = order_of(weight, least)
    codes = _in_turns([each.codes.view(torch.uint8) for each in matrix])
    packed = {
        "codes": pack_codes([codes], weight.spec, order),
        "scales": _in_turns([held_scales(each) for each in matrix]).t(),
    }
    if weight.spec.zero_points:
        packed["zeros"] = _in_turns([each.zeros for each in matrix if each.zeros is not None]).t()
    if weight.spec.act_order or not in_order(order, weight.in_features):
        packed["columns"] = order.inputs.to(torch.int32)
    factors = [each.global_scale.reshape(1) for each in matrix if each.global_scale is not None]
    if factors:
        packed["factor"] = torch.cat(factors).to(torch.float32)
    return packed, order.slots


def _in_turns(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors), dim=1).flatten(0, 1)


def _every(rows: torch.Tensor, turn: int, turns: int) -> torch.Tensor:
    """Return the rows of one projection, in memory of their own and in order."""
    return rows[turn::turns].clone(memory_format=torch.contiguous_format)


def _weight(
    product: Product, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, int], expert: int, number: int
) -> Weight:
    """Return one projection of an expert, on the CPU."""
    spec, turns = product.spec, product.turns
    part, turn = (0, number) if turns > 1 else (number, 0)
    columns = tensors.get("columns")
    if columns is not None:
        columns = (columns if columns.dim() == 1 else columns[expert, part]).cpu()
    codes = unpack_codes(
        tensors["codes"][expert, part].cpu(), columns, spec.element, meta["chunk"], turns * product.outputs,
        product.inputs,
    )  # fmt: skip
    held, stored = tensors["scales"][expert, part].cpu().t(), getattr(torch, spec.scale_dtype)
    scales = held.view(stored) if held.dtype == torch.uint8 else held.to(stored)
    zeros, factor = tensors.get("zeros"), tensors.get("factor")
    return Weight(
        _every(codes, turn, turns),
        _every(scales, turn, turns),
        spec,
        None if zeros is None else _every(zeros[expert, part].cpu().t(), turn, turns),
        unpack_groups(columns, meta["chunk"] * meta["per_group"], product.inputs) if spec.act_order else None,
        None if factor is None else factor[expert, number].cpu(),
    )
