"""
One of the two products of a mixture of experts: what it is compiled for, and how it is launched.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from quantplug_marlin.choice import choose_experts
from quantplug_marlin.cut import GroupCut
from quantplug_marlin.device import function
from quantplug_marlin.driver import Launch, matrix_map, weight_maps
from quantplug_marlin.launch import at

if TYPE_CHECKING:
    import torch

    from quantplug_marlin.cut import Cut
    from quantplug_marlin.device import Target
    from quantplug_marlin.form import Form

MULTIPLY = Struct("8Pq8i3P3f4x")
MULTIPLY_BOXES = Struct("4P6i4P3f28x")  # behind four tensor maps, as long as one


class Held(NamedTuple):
    """The tensors of one product's weights, see `expertprepare.py`."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    factor: torch.Tensor | None
    bias: torch.Tensor | None


class Places(NamedTuple):
    """
    What `cuda/route.cu` writes, as addresses, and how much of it there may be.

    Attributes:
        order: the choice that each place is for.
        owners: the expert of each block of places.
        used: how many blocks have rows.
        blocks: at most.
        rows: of a block.
    """

    order: int
    owners: int
    used: int
    blocks: int
    rows: int


class Side(NamedTuple):
    """
    One of the two products.

    Attributes:
        form: of its weights.
        number: 1 or 2.
        tiles: of 16 outputs per expert, of gate and up together.
        chunks: of 64 inputs.
        gated: whether it is the first and there is a gate.
        function: number of f.
        limited: whether f has a limit.
    """

    form: Form
    number: int
    tiles: int
    chunks: int
    gated: bool
    function: int
    limited: bool

    def definitions(self, cut: Cut | GroupCut) -> dict[str, int]:
        """Return what the source of the product is told."""
        own = {
            "EXPERTS": self.number,
            "GATED": int(self.gated),
            "FUNCTION": self.function,
            "LIMITED": int(self.limited),
        }
        return {**self.form.definitions(), **cut.definitions(), **own}

    def cut(self, rows: int, blocks: int, target: Target) -> Cut | GroupCut:
        """Return how it is cut for blocks of so many rows."""
        return choose_experts(self.form, self.tiles, self.chunks, rows, blocks, target)

    def launch(
        self, x: torch.Tensor, held: Held, y: torch.Tensor, features: int, places: Places, top_k: int, weights: int,
        numbers: list[float], target: Target, stream: int,
    ) -> None:  # fmt: skip
        """
        Multiply.

        Args:
            x: rows of x; for wgmma, and of the second product, in the order of places.
            held: the weights.
            y: what the product makes.
            features: outputs of an expert, of gate or up alone.
            places: where rows go.
            top_k: choices per row.
            weights: address of the router's weights where they multiply x, or 0.
            numbers: limit, alpha and offset of f.
            target: the device.
            stream: as the driver knows it.
        """
        cut = self.cut(places.rows, places.blocks, target)
        shared, device = cut.shared_bytes(self.form), y.get_device()
        found = function(cut.file, "multiply", self.definitions(cut), shared, device)
        grid = self._grid(cut, places)
        launch = Launch(found, grid, cut.threads, shared, stream, overlap=target.clusters)
        groups = 1 if held.scales is None else held.scales.shape[2]
        count = places.blocks * places.rows
        if isinstance(cut, GroupCut):
            x_map = matrix_map(x.data_ptr(), count, x.shape[1], x.stride(0) * 2, cut.tokens, half=self.form.half)
            scale = 0 if held.scales is None else held.scales.itemsize
            sizes = self.chunks * held.codes.shape[3], groups * 16 * scale, groups * 16
            every = held.codes.shape[0] * self.tiles
            maps = weight_maps(*(at(tensor) for tensor in held[:3]), every, sizes, cut.boxes(self.form))
            launch(
                x_map
                + maps
                + MULTIPLY_BOXES.pack(
                    at(held.zeros), at(held.factor), at(held.bias), y.data_ptr(), count, features, self.tiles,
                    self.chunks, top_k, y.shape[1], places.order, places.owners, places.used, weights, *numbers,
                )
            )  # fmt: skip
            return
        launch(
            MULTIPLY.pack(
                x.data_ptr(), *(at(tensor) for tensor in held), y.data_ptr(), 0, x.stride(0) * 2, count, features,
                x.shape[1], self.tiles, self.chunks, groups, top_k, y.shape[1], places.order, places.owners, weights,
                *numbers,
            )
        )  # fmt: skip

    def _grid(self, cut: Cut | GroupCut, places: Places) -> tuple[int, int, int]:
        if isinstance(cut, GroupCut):
            return cut.grid(self.tiles, places.blocks * places.rows)
        return -(-self.tiles // (cut.tiles * cut.warps_n)), places.blocks, 1
