"""
What compute-sanitizer's memcheck does on a GPU, for kernels in Triton's interpreter.

Each tensor that a launch is given is copied to a place of its own, far from all others, and every address that a kernel
reads or writes must lie in one of those places.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

APART = 1 << 20
"""Bytes between two tensors, at least: farther than a tile reaches, so that what leaves one does not end in another."""


class StrayError(Exception):
    """A kernel reads or writes what belongs to no tensor of its launch."""


class _Places:
    """Where the tensors of one launch lie: the addresses of their first elements and those behind their last."""

    def __init__(self) -> None:
        self.starts, self.ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def copied(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors, each storage of which is copied to a place of its own."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        arena = np.full(sum(2 * APART + storage.nbytes() for storage in storages.values()) + APART, 0xFF, np.uint8)
        made: dict[int, torch.UntypedStorage] = {}
        first = APART
        for key, storage in storages.items():
            # numpy's memory begins at 16 bytes, and so does each copy.
            first = -(-first // 16) * 16
            made[key] = torch.from_numpy(arena[first : first + storage.nbytes()]).untyped_storage()
            made[key].copy_(storage)
            first += storage.nbytes() + APART
        placed = []
        for tensor in tensors:
            copy = tensor.new_empty(0)
            copy.set_(made[tensor.untyped_storage().data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())
            placed.append(copy)
        spans = sorted((copy.data_ptr(), copy.data_ptr() + _span(copy)) for copy in placed)
        self.starts, self.ends = (np.array(each, np.uint64) for each in zip(*spans, strict=True))
        return placed

    def check(self, addresses: np.ndarray, size: int, what: str) -> None:
        """
        Look at elements of `size` bytes each.

        Raises:
            StrayError: one of them does not lie in a tensor.
        """
        place = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        behind = addresses + np.uint64(size) > np.maximum.accumulate(self.ends)[np.maximum(place, 0)]
        if stray := int(np.count_nonzero(behind | (place < 0))):
            raise StrayError(f"{what}: {stray} of {addresses.size} elements lie in no tensor of the launch")


def _span(tensor: torch.Tensor) -> int:
    """Return the bytes from the first element of a tensor to behind the last."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


@contextmanager
def guarded() -> Iterator[list[str]]:
    """
    Look at all that kernels read and write; yields the names of those that were launched.

    Raises:
        triton.runtime.errors.InterpreterError: a `StrayError`, as the interpreter passes it on.
    """
    places, launched = _Places(), []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def placed(self, given, kwargs):
        launched.append(self.fn.__name__)
        numbers = [number for number, each in enumerate(given) if isinstance(each, torch.Tensor)]
        copies = dict(zip(numbers, places.copied([given[number] for number in numbers]), strict=True))
        return [copies.get(number, each) for number, each in enumerate(given)], kwargs

    def looked_at(what, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places.check(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], size, what)

    def watched_load(self, pointers, mask, *others):
        looked_at("load", pointers, mask)
        return load(self, pointers, mask, *others)

    def watched_store(self, pointers, value, mask, *others):
        looked_at("store", pointers, mask)
        return store(self, pointers, value, mask, *others)

    with (
        patch.object(GridExecutor, "_init_args_hst", placed),
        patch.object(InterpreterBuilder, "create_masked_load", watched_load),
        patch.object(InterpreterBuilder, "create_masked_store", watched_store),
    ):
        yield launched
