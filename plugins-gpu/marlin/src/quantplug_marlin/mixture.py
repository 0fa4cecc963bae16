"""
The operator of torch that runs a mixture of experts, and what it launches.
"""

from __future__ import annotations

from math import isqrt
from struct import Struct
from typing import TYPE_CHECKING

import torch

from quantplug.cudacalls import stream_of
from quantplug.expertlimits import FUNCTIONS
from quantplug_marlin.device import build_all, function, target_of
from quantplug_marlin.driver import Launch
from quantplug_marlin.form import decode
from quantplug_marlin.launch import MOST_GRID_Y, THREADS, gather, is_readable, name_of, register
from quantplug_marlin.routing import add_up, kernels, route
from quantplug_marlin.seen import refuse_tangents
from quantplug_marlin.side import Held, Places, Side

if TYPE_CHECKING:
    from quantplug.expertweights import PreparedExperts
    from quantplug_marlin.device import Target

_ROWS = Struct("4Pq3i4x")
_FEW, _MANY = (8, 16, 32, 64), (8, 16, 32, 48, 64, 96, 128)
"""Rows of one expert that are multiplied together: without and with wgmma, which takes from 32 on."""
_WARPGROUPS_FROM = 32


def rows_per_block(choices: int, experts: int, target: Target) -> int:
    """
    Return how many rows of one expert are multiplied together.

    Those that an expert has on average, or more; for wgmma, where rows cost less, as many as nearly every expert has at
    most where a router chooses at random, so that its weights are read once.
    """
    average = -(-choices // experts)
    if target.warpgroups and average > 8:
        average += 2 * isqrt(average)
        return next((rows for rows in _MANY if average <= rows), _MANY[-1])
    return next((rows for rows in _FEW if average <= rows), _FEW[-1])


def _sides(prepared: PreparedExperts) -> tuple[Side, Side]:
    problem, tensors = prepared.problem, prepared.tensors
    half = problem.dtype == "float16"
    made = []
    for number, name in ((1, "w13"), (2, "w2")):
        form = decode(prepared.meta[f"{name}.form"], half=half, scale=name_of(tensors.get(f"{name}.scales")))
        _, tiles, chunks, _ = tensors[f"{name}.codes"].shape
        first = number == 1
        f = problem.function
        made.append(
            Side(
                form, number, tiles, chunks, first and f.gated, FUNCTIONS.index(f.name) if first else 0,
                first and f.limit is not None,
            )
        )  # fmt: skip
    return made[0], made[1]


def build(prepared: PreparedExperts) -> None:
    """Have every kernel compiled and loaded that a call may need, so that no call compiles."""
    device = prepared.tensors["w2.codes"].get_device()
    target, wanted = target_of(device), {}
    for side in _sides(prepared):
        for rows in _MANY if target.warpgroups else _FEW:
            for blocks in (1, 16, 1 << 20):
                cut = side.cut(rows, blocks, target)
                wanted[cut.file, tuple(side.definitions(cut).items())] = ("multiply", cut.shared_bytes(side.form))
    wanted.update(kernels(half=prepared.problem.dtype == "float16"))
    wanted["rows.cu", ()] = ("order_rows", 0)
    wanted["gather.cu", ()] = ("gather", 0)
    build_all(wanted, device)


def apply(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Return y `[M, H]`."""
    refuse_tangents(x, topk_weights)
    problem, tensors, meta, f = prepared.problem, prepared.tensors, prepared.meta, prepared.problem.function
    facts = [
        problem.experts, problem.intermediate, meta["w13.form"], meta["w2.form"], FUNCTIONS.index(f.name), int(f.gated),
        int(f.limit is not None), int(problem.router_weight_on_input),
    ]  # fmt: skip
    numbers = [f.limit if f.limit is not None else 0.0, f.alpha, f.up_offset]
    return experts(
        x, topk_weights, topk_ids, expert_map,
        tensors["w13.codes"], tensors.get("w13.scales"), tensors.get("w13.zeros"), tensors.get("w13.factor"),
        tensors.get("b13"),
        tensors["w2.codes"], tensors.get("w2.scales"), tensors.get("w2.zeros"), tensors.get("w2.factor"),
        tensors.get("b2"), facts, numbers,
    )  # fmt: skip


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    codes13: torch.Tensor, scales13: torch.Tensor | None, zeros13: torch.Tensor | None, factor13: torch.Tensor | None,
    bias13: torch.Tensor | None, codes2: torch.Tensor, scales2: torch.Tensor | None, zeros2: torch.Tensor | None,
    factor2: torch.Tensor | None, bias2: torch.Tensor | None, facts: list[int], numbers: list[float],
) -> torch.Tensor:  # fmt: skip
    device = x.get_device()
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _experts(
                x, topk_weights, topk_ids, expert_map, codes13, scales13, zeros13, factor13, bias13, codes2, scales2,
                zeros2, factor2, bias2, facts, numbers,
            )  # fmt: skip
    rows, hidden = x.shape
    y = x.new_empty((rows, hidden))
    if rows == 0:
        return y
    count, between, form13, form2, kind, gated, limited, on_input = facts
    half, stream, target, top_k = x.dtype == torch.float16, stream_of(device), target_of(device), topk_ids.shape[1]
    if not is_readable(x):
        x = gather(x, None, codes13.shape[2] * 64, stream)
    weights = topk_weights.to(torch.float32).contiguous()
    choices = rows * top_k
    size = rows_per_block(choices, count, target)
    routed = route(topk_ids, expert_map, count, size, stream)
    places = routed.places

    width = -(-between // 8) * 8
    h, outputs = x.new_empty((places.blocks * size, width)), x.new_empty((choices, hidden))
    first = Side(
        decode(form13, half=half, scale=name_of(scales13)), 1, codes13.shape[1], codes13.shape[2], bool(gated), kind,
        bool(limited),
    )  # fmt: skip
    second = Side(
        decode(form2, half=half, scale=name_of(scales2)), 2, codes2.shape[1], codes2.shape[2], False, 0, False
    )
    held13 = Held(codes13, scales13, zeros13, factor13, bias13)
    held2 = Held(codes2, scales2, zeros2, factor2, bias2)
    if target.warpgroups and size >= _WARPGROUPS_FROM:
        x = _in_order(x, places, top_k, stream)
    first.launch(x, held13, h, between, places, top_k, weights.data_ptr() if on_input else 0, numbers, target, stream)
    second.launch(h, held2, outputs, hidden, places, top_k, 0, numbers, target, stream)
    add_up(outputs, None if on_input else weights, routed, y, stream)
    return y


def _in_order(x: torch.Tensor, places: Places, top_k: int, stream: int) -> torch.Tensor:
    """Return rows of x at their places; places of blocks that are not used stay undefined."""
    count, inputs = places.blocks * places.rows, x.shape[1]
    y = x.new_empty((count, inputs))
    found = function("rows.cu", "order_rows", {}, 0, x.get_device())
    grid = (-(-inputs // (8 * THREADS)), min(count, MOST_GRID_Y), 1)
    launch = Launch(found, grid, THREADS, 0, stream, overlap=True)
    strides = x.stride(0) * 2, inputs * 2
    launch(_ROWS.pack(x.data_ptr(), y.data_ptr(), places.order, places.used, *strides, places.rows, top_k))
    return y


def _fake_experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_WEIGHT = "Tensor codes{0}, Tensor? scales{0}, Tensor? zeros{0}, Tensor? factor{0}, Tensor? bias{0}"

experts = register(
    "experts",
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    f"{_WEIGHT.format(13)}, {_WEIGHT.format(2)}, int[] facts, float[] numbers) -> Tensor",
    _experts,
    _fake_experts,
)
"""y `[M, H]` of a mixture of experts as one operator of torch, see `expertprepare.py` for the tensors."""
