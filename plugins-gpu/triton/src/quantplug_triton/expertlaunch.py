"""
How a call of experts is cut into programs, and the operator that launches them.

Nothing depends on what the router says: blocks of rows are as many as there can be at most, and those that no expert
needs end at once.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from quantplug_triton.expertdevice import combine, down, gate_and_up, route
from quantplug_triton.expertprepare import products
from quantplug_triton.fit import TILE_ROWS, field_bits
from quantplug_triton.launch import INTERPRETED, MOST_SHARES, PROGRAMS, processors
from quantplug_triton.prepare import kind_of, middle_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.expertweights import PreparedExperts

_CROWDED = 1.25
"""Rows of a block for each row that an expert has on average: experts have more and fewer than that."""

_OUTPUTS = 1024
"""Outputs of a program that adds up, at most."""

_CHOICES = 1024
"""Choices that routing looks at in one go, at most."""


class Cut(NamedTuple):
    """Rows of a block, outputs of a tile of either product, loads ahead, shares of the second product, and blocks."""

    block_m: int
    block_n: int
    stages: int
    shares: int
    blocks: int


def cut(choices: int, experts: int, outputs: int, steps: int, multiprocessors: int, *, wide: bool) -> Cut:
    """
    Return how a call is cut.

    Args:
        choices: M * T.
        experts: E.
        outputs: H, of the second product.
        steps: of the second product's loop over chunks.
        multiprocessors: of the device.
        wide: whether x is float32, of which large tiles do not fit into the shared memory of every device.
    """
    block_m = min(32 if wide else 64, max(16, triton.next_power_of_2(ceil(_CROWDED * choices / experts))))
    # Every expert with rows may have one block that is not full.
    blocks = (choices + min(choices, experts) * (block_m - 1)) // block_m
    wanted = triton.next_power_of_2(ceil(PROGRAMS * multiprocessors / (blocks * triton.cdiv(outputs, TILE_ROWS))))
    block_n = 2 * TILE_ROWS if block_m == 64 else TILE_ROWS
    stages = 2 if wide else 4 if block_m < 64 else 3
    return Cut(block_m, block_n, stages, max(1, min(MOST_SHARES, steps // 2, wanted)), blocks)


def call(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Return y `[M, H]` for a layer, see `MoEKernel.apply`."""
    problem, tensors, meta = prepared.problem, prepared.tensors, prepared.meta
    function = problem.function
    weights, forms = [], []
    for product in products(problem):
        ending, element = f".{product.name}", product.spec.element
        weights += [tensors.get(name + ending) for name in ("codes", "scales", "zeros", "columns", "factor")]
        weights.append(tensors.get(f"b{product.name}"))
        layout = [meta[name + ending] for name in ("chunk", "per_group", "rows_per_scale")]
        forms.append([kind_of(element), field_bits(element), middle_of(element), *layout])
    return experts(
        x, topk_weights, topk_ids, expert_map, *weights, *forms, problem.experts, problem.intermediate,
        problem.router_weight_on_input, function.name, function.gated, function.limit, function.alpha,
        function.up_offset,
    )  # fmt: skip


class _Form(NamedTuple):
    """How a product's codes are decoded and laid out, see `device.sums`."""

    kind: int
    bits: int
    middle: int
    chunk: int
    per_group: int
    rows_per_scale: int

    @property
    def fields(self) -> int:
        return 8 // self.bits

    def constants(self, columns: torch.Tensor | None, *, exact: bool) -> dict[str, object]:
        """Return what kernels are compiled for."""
        return {
            "KIND": self.kind, "BITS": self.bits, "MIDDLE": self.middle, "CHUNK": self.chunk,
            "COLUMNS": columns is not None, "ONE_GROUP": self.per_group % self.fields == 0, "EXACT": exact,
            "TILE_ROWS": TILE_ROWS,
        }  # fmt: skip


def _chunks(codes: torch.Tensor, form: _Form) -> int:
    return codes.shape[3] // form.chunk * form.fields


def _between_experts(columns: torch.Tensor | None) -> int:
    """Return what lies between the columns of two parts: nothing where all experts share them."""
    return 0 if columns is None or columns.dim() == 1 else columns.shape[-1]


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """What a kernel is given in place of a tensor that is not there: it moves the pointer, and reads nothing."""
    return other if tensor is None else tensor


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    codes13: torch.Tensor, scales13: torch.Tensor, zeros13: torch.Tensor | None, columns13: torch.Tensor | None,
    factor13: torch.Tensor | None, b13: torch.Tensor | None,
    codes2: torch.Tensor, scales2: torch.Tensor, zeros2: torch.Tensor | None, columns2: torch.Tensor | None,
    factor2: torch.Tensor | None, b2: torch.Tensor | None,
    form13: Sequence[int], form2: Sequence[int], count: int, intermediate: int, weight_on_input: bool,
    function: str, gated: bool, limit: float | None, alpha: float, up_offset: float,
) -> torch.Tensor:  # fmt: skip
    rows, hidden = x.shape
    top_k = topk_ids.shape[1]
    choices = rows * top_k
    y = torch.empty(rows, hidden, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if rows == 0:
        return y.to(x.dtype)
    first, second = _Form(*form13), _Form(*form2)
    chunks13, chunks2 = _chunks(codes13, first), _chunks(codes2, second)
    wide = x.dtype == torch.float32
    plan = cut(choices, count, hidden, chunks2 // second.fields, processors(x.device.index), wide=wide)
    steps = triton.cdiv(chunks2 // second.fields, plan.shares)
    shares = triton.cdiv(chunks2 // second.fields, steps)
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    local = None if expert_map is None else expert_map.contiguous()
    mapped = 0 if local is None else local.shape[0]
    exact = wide or INTERPRETED

    order = torch.empty(choices, dtype=torch.int32, device=x.device)
    blocks = torch.empty(3, plan.blocks, dtype=torch.int32, device=x.device)
    route[(count + 1,)](
        ids, local, order, blocks, choices, count, mapped, plan.blocks,
        MAP=local is not None, BLOCK_M=plan.block_m, BINS=max(64, triton.next_power_of_2(count + 1)),
        BLOCK=max(64, min(_CHOICES, triton.next_power_of_2(choices))), num_warps=4,
    )  # fmt: skip

    parts = codes13.shape[1]
    turns = (2 if gated else 1) // parts
    block_n = max(TILE_ROWS, plan.block_n // parts)
    h = torch.empty(choices, intermediate, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    gate_and_up[(triton.cdiv(turns * intermediate, block_n), plan.blocks)](
        x, weights, order, blocks, codes13, scales13, _or(zeros13, scales13), _or(columns13, order),
        _or(factor13, weights), _or(b13, x), h,
        plan.blocks, top_k, hidden, intermediate, chunks13, scales13.shape[2], first.per_group, first.rows_per_scale,
        scales13.shape[3], x.stride(0), x.stride(1), codes13.stride(1), scales13.stride(1), _between_experts(columns13),
        0.0 if limit is None else limit, alpha, up_offset,
        **first.constants(columns13, exact=exact), FACTOR=factor13 is not None, BIAS=b13 is not None,
        ON_INPUT=weight_on_input, PARTS=parts, TURNS=turns, NAME=function, LIMITED=limit is not None,
        BLOCK_M=plan.block_m, BLOCK_N=block_n, num_warps=4, num_stages=plan.stages,
    )  # fmt: skip

    o = torch.empty(shares, choices, hidden, dtype=torch.float32, device=x.device)
    down[(triton.cdiv(hidden, plan.block_n), plan.blocks, shares)](
        h, order, blocks, codes2, scales2, _or(zeros2, scales2), _or(columns2, order), o,
        plan.blocks, intermediate, hidden, chunks2, steps * second.fields, scales2.shape[2], second.per_group,
        second.rows_per_scale, scales2.shape[3], codes2.stride(1), scales2.stride(1), _between_experts(columns2),
        o.stride(0), **second.constants(columns2, exact=exact),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=4, num_stages=plan.stages,
    )  # fmt: skip

    block = min(_OUTPUTS, triton.next_power_of_2(hidden))
    combine[(rows, triton.cdiv(hidden, block))](
        o, ids, local, weights, _or(factor2, weights), _or(b2, x), y,
        top_k, choices, count, mapped, hidden, o.stride(0),
        MAP=local is not None, SHARES=shares, FACTOR=factor2 is not None, BIAS=b2 is not None,
        ON_INPUT=weight_on_input, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y.to(x.dtype)


def _fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_PRODUCT = "Tensor codes{0}, Tensor scales{0}, Tensor? zeros{0}, Tensor? columns{0}, Tensor? factor{0}, Tensor? b{0}, "
_SCHEMA = (
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    + _PRODUCT.format("13")
    + _PRODUCT.format("2")
    + "int[] form13, int[] form2, int experts, int intermediate, bool weight_on_input, str function, bool gated, "
    "float? limit, float alpha, float up_offset) -> Tensor"
)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define("quantplug_triton::experts", _SCHEMA)
    # On the CPU only Triton's interpreter runs it, in tests.
    torch.library.impl("quantplug_triton::experts", ("CUDA", "CPU"), _experts)
    torch.library.register_fake("quantplug_triton::experts", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_triton.experts.default
    return operator


experts = _register()
"""A layer of experts as one operator of torch, see `expertprepare.py` for the tensors."""
