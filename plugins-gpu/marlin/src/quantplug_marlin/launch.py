"""
The operators of torch that launch the kernels.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.cudacalls import current_device, empty, stream_of
from quantplug_marlin.choice import choose
from quantplug_marlin.cut import GroupCut
from quantplug_marlin.device import function, target_of
from quantplug_marlin.driver import Launch, matrix_map, weight_maps
from quantplug_marlin.form import Form, decode
from quantplug_marlin.seen import is_seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug_marlin.cut import Cut

_MULTIPLY = Struct("8Pq6i")
_MULTIPLY_BOXES = Struct("4P4i16x")  # behind four tensor maps, half as long as one
_GATHER = Struct("3P2q3i4x")
_SHARES = Struct("4P3i4x")
_DENSE = Struct("6P5i4x")

_OUT = {"bfloat16": 0, "float16": 1, "float32": 2}
THREADS = 256
"""Of a block, where nothing else decides."""
MOST_GRID_Y = 65535
"""Blocks below each other that a launch may have."""


class Way(NamedTuple):
    """
    How a product is launched.

    Attributes:
        multiply: the launch.
        box_rows: rows of x that are read at once through a tensor map; 0 where there is none.
        boxes: bytes of codes, scales and zero points of a tile that are, too.
        splits: blocks that share the chunks.
        add: the launch that adds their sums.
        outputs: N.
        tiles: of 16 outputs.
        chunks: of 64 inputs.
    """

    multiply: Launch
    box_rows: int
    boxes: tuple[int, int, int]
    splits: int
    add: Launch | None
    outputs: int
    tiles: int
    chunks: int


_NO_BOXES = (0, 0, 0)
_ways: dict[tuple[object, ...], Way] = {}


def way(
    form: Form, cut: Cut | GroupCut | None, outputs: int, tiles: int, chunks: int, rows: int, device: int, stream: int
) -> Way:
    """
    Return how a product is launched, with its kernels compiled and loaded.

    Args:
        form: of the weight.
        cut: of the product; None for the one that suits it.
        outputs: N.
        tiles: of 16 outputs.
        chunks: of 64 inputs.
        rows: of x, at least 1.
        device: index of the GPU.
        stream: as the driver knows it.
    """
    target = target_of(device)
    if cut is None:
        cut = choose(form, tiles, chunks, rows, target)
    shared = cut.shared_bytes(form)
    found = function(cut.file, "multiply", {**form.definitions(), **cut.definitions()}, shared, device)
    launch = Launch(found, cut.grid(tiles, rows), cut.threads, shared, stream, overlap=target.clusters)
    if isinstance(cut, GroupCut):
        return Way(launch, cut.tokens, cut.boxes(form), 1, None, outputs, tiles, chunks)
    if cut.splits == 1:
        return Way(launch, 0, _NO_BOXES, 1, None, outputs, tiles, chunks)
    adding = function("shares.cu", "add_shares", form.definitions(), 0, device)
    grid = (-(-outputs // THREADS), min(rows, MOST_GRID_Y), 1)
    adder = Launch(adding, grid, THREADS, 0, stream, overlap=False)
    return Way(launch, 0, _NO_BOXES, cut.splits, adder, outputs, tiles, chunks)


def linear_now(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None,
    factor: torch.Tensor | None, columns: torch.Tensor | None, bias: torch.Tensor | None, outputs: int, form: int,
) -> torch.Tensor:  # fmt: skip
    """Do what the operator `linear` does."""
    rows, device = x.shape[0], x.get_device()
    if current_device() != device:
        with torch.cuda.device(device):
            return linear_now(x, codes, scales, zeros, factor, columns, bias, outputs, form)
    y = empty((rows, outputs), (outputs, 1), x.dtype)
    if rows == 0:
        return y
    stream = stream_of(device)
    if columns is not None or not is_readable(x):
        x = gather(x, columns, codes.shape[1] * 64, stream)
    tiles, chunks, _ = codes.shape
    dtype = x.dtype
    # Grids are the same for up to eight rows.
    key = (form, dtype, None if scales is None else scales.dtype, outputs, chunks, (rows + 7) // 8, device, stream)
    chosen = _ways.get(key)
    if chosen is None:
        stored = decode(form, half=dtype == torch.float16, scale=name_of(scales))
        chosen = _ways[key] = way(stored, None, outputs, tiles, chunks, rows, device, stream)
    run(chosen, x, codes, scales, zeros, factor, bias, y)
    return y


def run(
    chosen: Way, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None,
    factor: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor,
) -> None:  # fmt: skip
    """Launch a product whose x the kernel can read as it is; see `prepare.py` for the other tensors."""
    multiply, box_rows, boxes, splits, add, outputs, tiles, chunks = chosen
    rows, inputs = x.shape
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    at_x, at_y, stride = x.data_ptr(), y.data_ptr(), x.stride(0) * 2
    at_factor, at_bias = (0 if factor is None else factor.data_ptr()), (0 if bias is None else bias.data_ptr())
    at_zeros = 0 if zeros is None else zeros.data_ptr()
    at_scales, groups = (0, 1) if scales is None else (scales.data_ptr(), scales.shape[1])
    if box_rows:
        x_map = matrix_map(at_x, rows, inputs, stride, box_rows, half=x.dtype == torch.float16)
        held = chunks * codes.shape[2], groups * (0 if scales is None else 16 * scales.itemsize), groups * 16
        maps = weight_maps(codes.data_ptr(), at_scales, at_zeros, tiles, held, boxes)
        multiply(x_map + maps + _MULTIPLY_BOXES.pack(at_zeros, at_factor, at_bias, at_y, rows, outputs, tiles, chunks))
        return
    at_shares = 0
    if add is not None:
        shares = empty((splits, rows, outputs), (rows * outputs, outputs, 1), torch.float32)
        at_shares = shares.data_ptr()
    packed = _MULTIPLY.pack(
        at_x, codes.data_ptr(), at_scales, at_zeros, at_factor, at_bias, at_y, at_shares, stride, rows, outputs, inputs,
        tiles, chunks, groups,
    )  # fmt: skip
    multiply(packed)
    if add is not None:
        add(_SHARES.pack(at_shares, at_factor, at_bias, at_y, splits, rows, outputs))


def is_readable(x: torch.Tensor) -> bool:
    """Whether kernels can read x as it is: 16 bytes at a time, row by row."""
    rows, inputs = x.shape
    across, along = x.stride()
    if inputs % 8 or x.data_ptr() % 16 or (along != 1 and inputs > 1):
        return False
    return rows == 1 or (across % 8 == 0 and across >= inputs)


def gather(x: torch.Tensor, columns: torch.Tensor | None, slots: int, stream: int) -> torch.Tensor:
    """Return x in the order of slots."""
    rows, inputs = x.shape
    gathered = x.new_empty((rows, slots))
    found = function("gather.cu", "gather", {}, 0, x.get_device())
    launch = Launch(found, (-(-slots // THREADS), min(rows, MOST_GRID_Y), 1), THREADS, 0, stream, overlap=False)
    launch(_GATHER.pack(x.data_ptr(), at(columns), gathered.data_ptr(), *x.stride(), rows, inputs, slots))
    return gathered


def dense_definitions(form: Form, dtype: str) -> dict[str, int]:
    """Return what `cuda/dense.cu` is told of a weight whose values are to be in a dtype."""
    return {**form.definitions(), "OUT": _OUT[dtype]}


def _dequantize(
    codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None, factor: torch.Tensor | None,
    columns: torch.Tensor | None, outputs: int, inputs: int, form: int, half: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    device = codes.get_device()
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _dequantize(codes, scales, zeros, factor, columns, outputs, inputs, form, half, dtype)
    values = codes.new_empty((outputs, inputs), dtype=dtype)
    stored = decode(form, half=half, scale=name_of(scales))
    tiles, chunks, _ = codes.shape
    found = function("dense.cu", "dequantize", dense_definitions(stored, str(dtype).removeprefix("torch.")), 0, device)
    stream = stream_of(device)
    launch = Launch(found, (-(-chunks // 8), tiles, 1), THREADS, 0, stream, overlap=False)
    groups = 1 if scales is None else scales.shape[1]
    weight = (codes.data_ptr(), at(scales), at(zeros), at(factor), at(columns))
    launch(_DENSE.pack(*weight, values.data_ptr(), outputs, inputs, tiles, chunks, groups))
    return values


def at(tensor: torch.Tensor | None) -> int:
    """Return where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def name_of(scales: torch.Tensor | None) -> str:
    """Return the dtype of scales, "" for none."""
    return "" if scales is None else str(scales.dtype).removeprefix("torch.")


def _fake_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None,
    factor: torch.Tensor | None, columns: torch.Tensor | None, bias: torch.Tensor | None, outputs: int, form: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


def _fake_dequantize(
    codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None, factor: torch.Tensor | None,
    columns: torch.Tensor | None, outputs: int, inputs: int, form: int, half: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return codes.new_empty(outputs, inputs, dtype=dtype)


def register(
    name: str, schema: str, function: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Register a CUDA operator `quantplug_marlin::name` with its schema and its fake, and return it."""
    qualified = f"quantplug_marlin::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CUDA", function)
    torch.library.register_fake(qualified, fake)
    operator: Callable[..., torch.Tensor] = getattr(torch.ops.quantplug_marlin, name).default
    return operator


_WEIGHT = "Tensor codes, Tensor? scales, Tensor? zeros, Tensor? factor, Tensor? columns"

linear = register(
    "linear", f"(Tensor x, {_WEIGHT}, Tensor? bias, int outputs, int form) -> Tensor", linear_now, _fake_linear
)
"""`y [M, N] = x [M, K] @ W^T + bias` as one operator of torch, see `prepare.py` for the tensors."""


def linear_for(x: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """Return what computes a product: the operator, or at once what it does, where nobody would see the operator."""
    return linear if is_seen(x, bias) else linear_now


dequantize = register(
    "dequantize",
    f"({_WEIGHT}, int outputs, int inputs, int form, bool half, ScalarType dtype) -> Tensor",
    _dequantize,
    _fake_dequantize,
)
"""The values `[N, K]` in bfloat16, float16 or float32."""
