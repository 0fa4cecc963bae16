"""
What lies around the products of a mixture: choices are put in the order of experts, and what experts give is added up.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug_marlin.device import function, target_of
from quantplug_marlin.driver import Launch
from quantplug_marlin.launch import MOST_GRID_Y, THREADS, at
from quantplug_marlin.side import Places

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROUTE = Struct("6P6i")
_COMBINE = Struct("4P3i4x")
_ROUTE_THREADS = 1024


class Routed(NamedTuple):
    """
    Choices in the order of experts.

    Attributes:
        places: of each expert.
        local: address of each choice's expert here, -1 for none.
        memory: int32, which all of these lie in.
    """

    places: Places
    local: int
    memory: torch.Tensor


def kernels(*, half: bool) -> Iterator[tuple[tuple[str, tuple[tuple[str, int], ...]], tuple[str, int]]]:
    """Yield the kernels that are launched here, as `device.build_all` wants them."""
    yield ("route.cu", ()), ("route", 0)
    yield ("combine.cu", (("HALF", int(half)),)), ("combine", 0)


def most_blocks(choices: int, experts: int, rows: int) -> int:
    """Return how many blocks of so many rows choices can take at most, however they fall."""
    return min(choices, choices // rows + min(experts, choices))


def route(ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, rows: int, stream: int) -> Routed:
    """
    Put choices in the order of experts, those of each filled up to a multiple of a block's rows.

    Args:
        ids: `[M, T]`, integers.
        expert_map: the local numbers of experts, or None.
        experts: how many there are here.
        rows: of a block.
        stream: as the driver knows it.
    """
    ids = ids.contiguous()
    if ids.dtype not in {torch.int32, torch.int64}:
        ids = ids.to(torch.int64)
    numbers = None if expert_map is None else expert_map.to(torch.int32).contiguous()
    choices, device = ids.numel(), ids.get_device()
    blocks = most_blocks(choices, experts, rows)
    memory = ids.new_empty(blocks * rows + blocks + choices + 1, dtype=torch.int32)
    order = memory.data_ptr()
    owners = order + 4 * blocks * rows
    local = owners + 4 * blocks
    used = local + 4 * choices
    launch = Launch(function("route.cu", "route", {}, 0, device), (1, 1, 1), _ROUTE_THREADS, 0, stream, overlap=False)
    launch(
        _ROUTE.pack(
            ids.data_ptr(), at(numbers), order, owners, local, used, choices, experts,
            0 if numbers is None else numbers.shape[0], rows, blocks, int(ids.dtype == torch.int64),
        )
    )  # fmt: skip
    return Routed(Places(order, owners, used, blocks, rows), local, memory)


def add_up(outputs: torch.Tensor, weights: torch.Tensor | None, routed: Routed, y: torch.Tensor, stream: int) -> None:
    """Write y `[M, H]`, out of what experts give for each choice `[M T, H]`, times float32 weights `[M, T]` or 1."""
    (rows, hidden), device = y.shape, y.get_device()
    found = function("combine.cu", "combine", {"HALF": int(y.dtype == torch.float16)}, 0, device)
    columns = hidden // 8 if hidden % 8 == 0 else hidden
    grid = (-(-columns // THREADS), min(rows, MOST_GRID_Y), 1)
    launch = Launch(found, grid, THREADS, 0, stream, overlap=target_of(device).clusters)
    top_k = len(outputs) // rows
    launch(_COMBINE.pack(outputs.data_ptr(), at(weights), routed.local, y.data_ptr(), rows, hidden, top_k))
