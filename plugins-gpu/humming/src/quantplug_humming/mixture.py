"""
The operator of torch that runs a mixture of experts: routing, humming's indexed product twice, and what lies between.

Nothing depends on what the router says, so that a captured graph follows it: humming reads from the device how many
blocks of rows there are. What a call needs beside weights is its own, humming's counters included.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from quantplug_humming.choice import Choice, choose
from quantplug_humming.expertdevice import between, combine, route, tally
from quantplug_humming.form import Form
from quantplug_humming.prepare import NAMES, layer_config
from quantplug_humming.product import widened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.expertweights import PreparedExperts

_LOCKS = 2048
"""Counters by which humming's parts of a sum wait for each other: as many as its own layers have."""

_INDEXED = json.dumps({"gemm_type": "indexed"})
_CHOICES = 1024
"""Choices that routing looks at in one go, where they are few."""

_MANY_CHOICES = 4096
_COLUMNS = 512


def apply(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Return y `[M, H]`."""
    problem, tensors, meta, f = prepared.problem, prepared.tensors, prepared.meta, prepared.problem.function
    given = [tensors.get(f"{product}.{name}") for product in ("w13", "w2") for name in (*NAMES, "bias")]
    facts = [[meta[f"{product}.{name}"] for name in Form._fields] for product in ("w13", "w2")]
    return experts(
        x, topk_weights, topk_ids, expert_map, *given, *facts, problem.experts, problem.router_weight_on_input,
        f.name, f.gated, f.limit, f.alpha, f.up_offset,
    )  # fmt: skip


class Choices(NamedTuple):
    """
    What a router says: for T experts of each of M rows.

    Attributes:
        ids: contiguous `[M, T]`.
        local: the numbers that a map gives, or None.
        experts: E.
    """

    ids: torch.Tensor
    local: torch.Tensor | None
    experts: int

    @property
    def total(self) -> int:
        """M * T."""
        return self.ids.numel()

    @property
    def mapped(self) -> int:
        """Numbers that the map has."""
        return 0 if self.local is None else self.local.shape[0]


class Blocks(NamedTuple):
    """
    Choices in blocks of rows of one expert each, see `expertdevice.route`.

    Attributes:
        rows: of a block.
        order: the choices, int32.
        owners: the expert of each block, int32.
        total: places that are anybody's, one int32.
        locks: humming's counters, 0.
    """

    rows: int
    order: torch.Tensor
    owners: torch.Tensor
    total: torch.Tensor
    locks: torch.Tensor


def most_blocks(choices: int, experts: int, rows: int) -> int:
    """Return how many blocks of so many rows choices can take at most, however they fall."""
    return min(choices, choices // rows + min(experts, choices))


def to_blocks(choices: Choices, rows: int) -> Blocks:
    """Return choices in blocks of so many rows, by one launch, or two where choices are many."""
    count = choices.total
    blocks = most_blocks(count, choices.experts, rows)
    # humming reads the order by 16 bytes and wants counters aligned to as many: what may have any length comes last.
    sizes = [_LOCKS, blocks * rows, blocks, 1, choices.experts]
    scratch = torch.empty(sum(sizes), dtype=torch.int32, device=choices.ids.device)
    locks, order, owners, total, counts = scratch.split(sizes)
    mapped, many = choices.local is not None, count > _CHOICES
    block = max(64, triton.next_power_of_2(min(count, _MANY_CHOICES)))
    if many:
        tally[(choices.experts,)](
            choices.ids, choices.local, counts, count, choices.experts, choices.mapped,
            MAP=mapped, BLOCK=block, num_warps=8,
        )  # fmt: skip
    route[(choices.experts + 1,)](
        choices.ids, choices.local, counts, order, owners, total, locks, count, choices.experts, choices.mapped, rows,
        MAP=mapped, TALLIED=many, BINS=max(64, triton.next_power_of_2(choices.experts + 1)), BLOCK=block,
        FILL=triton.next_power_of_2(rows), LOCKS=_LOCKS, num_warps=8 if many else 4,
    )  # fmt: skip
    return Blocks(rows, order, owners, total, locks)


class _Product(NamedTuple):
    """One of the two products: humming's tensors of its weight, and its form."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    form: Form

    def choose(self, choices: Choices, device: torch.device) -> Choice:
        """Return humming's choice of a kernel."""
        return choose(self.form, self.bias is not None, choices.experts, choices.total, device.index or 0)

    def multiply(self, x: torch.Tensor, choice: Choice, experts: int, blocks: Blocks, top_k: int) -> torch.Tensor:
        """Return the product of each choice, `[M * T, N filled up to 8]`; x has a row for so many choices."""
        from humming.ops import humming_gemm

        config = layer_config(self.form, bias=self.bias is not None, experts=experts)
        product: torch.Tensor = humming_gemm(
            layer_config=config.to_str(),
            compute_config=_INDEXED,
            tuning_config=choice.tuning,
            inputs=widened(x, config.shape_k - config.pad_shape_k),
            weight=self.weight,
            weight_scale=self.scales,
            zero_point=self.zeros,
            bias=self.bias,
            sorted_ids=blocks.order,
            expert_ids=blocks.owners,
            num_tokens_padded=blocks.total,
            locks=blocks.locks,
            top_k=top_k,
        )
        return product


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    weight13: torch.Tensor, scales13: torch.Tensor, zeros13: torch.Tensor | None, bias13: torch.Tensor | None,
    weight2: torch.Tensor, scales2: torch.Tensor, zeros2: torch.Tensor | None, bias2: torch.Tensor | None,
    facts13: Sequence[int], facts2: Sequence[int], count: int, on_input: bool,
    function: str, gated: bool, limit: float | None, alpha: float, up_offset: float,
) -> torch.Tensor:  # fmt: skip
    rows, hidden = x.shape
    y = x.new_empty(rows, hidden)
    if rows == 0:
        return y
    with torch.cuda.device_of(x):
        ids, weights = topk_ids.contiguous(), topk_weights.to(torch.float32).contiguous()
        choices = Choices(ids, None if expert_map is None else expert_map.contiguous(), count)
        named = (choices.total, choices.experts, choices.mapped)
        mapped, top_k = choices.local is not None, topk_ids.shape[1]
        first = _Product(weight13, scales13, zeros13, bias13, Form(*facts13))
        second = _Product(weight2, scales2, zeros2, bias2, Form(*facts2))

        given = (x.to(torch.float32) * weights).to(x.dtype) if on_input else x
        choice = first.choose(choices, x.device)
        blocks = to_blocks(choices, choice.rows)
        product = first.multiply(given, choice, count, blocks, top_k)
        width = second.form.inputs
        h = x.new_empty(choices.total, width)
        block = min(_COLUMNS, triton.next_power_of_2(width))
        between[(choices.total, triton.cdiv(width, block))](
            product, ids, choices.local, h, *named, width, 0.0 if limit is None else limit, alpha, up_offset,
            MAP=mapped, GATED=gated, LIMITED=limit is not None, NAME=function, BLOCK=block, num_warps=4,
        )  # fmt: skip
        choice = second.choose(choices, x.device)
        if choice.rows != blocks.rows:
            blocks = to_blocks(choices, choice.rows)
        product = second.multiply(h, choice, count, blocks, 1)
        block = min(_COLUMNS, triton.next_power_of_2(hidden))
        combine[(rows, triton.cdiv(hidden, block))](
            product, ids, choices.local, weights, y, *named, product.shape[1], hidden,
            MAP=mapped, TOP_K=top_k, ON_INPUT=on_input, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y


def _fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_PRODUCT = "Tensor weight{0}, Tensor scales{0}, Tensor? zeros{0}, Tensor? bias{0}, "
_SCHEMA = (
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    + _PRODUCT.format("13")
    + _PRODUCT.format("2")
    + "int[] facts13, int[] facts2, int experts, bool on_input, str function, bool gated, float? limit, float alpha, "
    "float up_offset) -> Tensor"
)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define("quantplug_humming::experts", _SCHEMA)
    # On the CPU only Triton's interpreter and a stand-in for humming run it, in tests.
    torch.library.impl("quantplug_humming::experts", ("CUDA", "CPU"), _experts)
    torch.library.register_fake("quantplug_humming::experts", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_humming.experts.default
    return operator


experts = _register()
"""A layer of experts as one operator of torch, see `expertprepare.py` for the tensors."""
