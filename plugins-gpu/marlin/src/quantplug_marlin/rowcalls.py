"""
A product with weights that lie row by row, as an operator of torch, and a layer of them part by part.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.cudacalls import current_device, empty, stream_of
from quantplug.spec import ElementType
from quantplug_marlin.cut import GroupCut
from quantplug_marlin.device import build_all, function, target_of
from quantplug_marlin.driver import Launch, matrix_map, rows_map
from quantplug_marlin.form import Form
from quantplug_marlin.launch import gather, is_readable, register
from quantplug_marlin.rowchoice import choose_rows, every_rows_choice
from quantplug_marlin.seen import is_seen

if TYPE_CHECKING:
    from quantplug.weight import Prepared
    from quantplug_marlin.cut import Cut

_MULTIPLY = Struct("8Pq10i")
_CHUNK = 128
_TILE = 16

_MULTIPLY_BOXES = Struct("4P4iP3i60x")  # behind four tensor maps, as long as one
_NO_MAPS = bytes(256)

_ways: dict[tuple[object, ...], Way] = {}


class Way(NamedTuple):
    """
    How a product is launched.

    Attributes:
        multiply: the launch.
        box_rows: rows of x that are read at once through a tensor map; 0 where there is none.
        tiles: of 16 outputs.
        chunks: of 128 inputs.
    """

    multiply: Launch
    box_rows: int
    tiles: int
    chunks: int


def form_of_rows(codes: torch.Tensor, scales: torch.Tensor, *, half: bool) -> Form:
    """Return the form of a part, whose x is float16 or bfloat16."""
    element = ElementType(str(codes.dtype).removeprefix("torch."))
    blocks = scales.shape[0] > 1  # K with blocks is filled up to four of them
    return Form(element, half, "float32" if blocks else "", int(blocks), 2 if blocks else 1, rows=True)


def sizes_of(codes: torch.Tensor) -> tuple[int, int]:
    """Return the tiles of 16 outputs and the chunks of 128 inputs, the last perhaps short, of codes `[R, S]`."""
    return codes.shape[0] // _TILE, -(-codes.shape[1] // _CHUNK)


def build(prepared: Prepared) -> None:
    """Have every kernel compiled and loaded that a call with this layer may need, so that no call compiles."""
    tensors, half = prepared.tensors, prepared.problem.dtype == "float16"
    device = tensors["codes.0"].get_device()
    target, wanted = target_of(device), {}
    for number in range(prepared.meta["parts"]):
        codes = tensors[f"codes.{number}"]
        form = form_of_rows(codes, tensors[f"scales.{number}"], half=half)
        for cut in every_rows_choice(form, *sizes_of(codes), target):
            definitions = {**form.definitions(), **cut.definitions()}
            wanted[cut.file, tuple(definitions.items())] = ("multiply", cut.shared_bytes(form))
    wanted["gather.cu", ()] = ("gather", 0)
    build_all(wanted, device)


def apply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    tensors, meta = prepared.tensors, prepared.meta
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    linear = linear_rows if is_seen(flat, bias) else linear_rows_now
    if meta["parts"] == 1:
        y = linear(flat, tensors["codes.0"], tensors["scales.0"], bias, meta["rows.0"])
    else:
        results, first = [], 0
        for number in range(meta["parts"]):
            rows = meta[f"rows.{number}"]
            part = None if bias is None else bias[first : first + rows]
            results.append(linear(flat, tensors[f"codes.{number}"], tensors[f"scales.{number}"], part, rows))
            first += rows
        y = torch.cat(results, dim=1)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], prepared.problem.out_features)


def way(form: Form, cut: Cut | GroupCut | None, tiles: int, chunks: int, rows: int, device: int, stream: int) -> Way:
    """
    Return how a product is launched, with its kernel compiled and loaded.

    Args:
        form: of the weight.
        cut: of the product; None for the one that suits it.
        tiles: of 16 outputs.
        chunks: of 128 inputs.
        rows: of x, at least 1.
        device: index of the GPU.
        stream: as the driver knows it.
    """
    target = target_of(device)
    cut = cut or choose_rows(form, tiles, chunks, rows, target)
    shared = cut.shared_bytes(form)
    found = function(cut.file, "multiply", {**form.definitions(), **cut.definitions()}, shared, device)
    launch = Launch(found, cut.grid(tiles, rows), cut.threads, shared, stream, overlap=target.clusters)
    return Way(launch, cut.tokens if isinstance(cut, GroupCut) else 0, tiles, chunks)


def linear_rows_now(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    """Do what the operator `linear_rows` does."""
    rows, device = x.shape[0], x.get_device()
    if current_device() != device:
        with torch.cuda.device(device):
            return linear_rows_now(x, codes, scales, bias, outputs)
    y = empty((rows, outputs), (outputs, 1), x.dtype)
    if rows == 0:
        return y
    stream = stream_of(device)
    if not is_readable(x):
        x = gather(x, None, codes.shape[1], stream)
    # Grids are the same for up to eight rows.
    key = (codes.dtype, x.dtype, codes.shape, scales.shape[0] > 1, (rows + 7) // 8, device, stream)
    chosen = _ways.get(key)
    if chosen is None:
        form = form_of_rows(codes, scales, half=x.dtype == torch.float16)
        chosen = _ways[key] = way(form, None, *sizes_of(codes), rows, device, stream)
    run(chosen, x, codes, scales, bias, y)
    return y


def run(
    chosen: Way, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """Launch a product whose x the kernel can read as it is."""
    multiply, box_rows, tiles, chunks = chosen
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    (rows, inputs), (filled, width), (along, across) = x.shape, codes.shape, scales.stride()
    at_x, at_codes, at_scales, stride = x.data_ptr(), codes.data_ptr(), scales.data_ptr(), x.stride(0) * 2
    at_factor = 0 if scales.shape[0] > 1 else at_scales
    factor_step = int(scales.shape[1] > 1)
    at_bias, at_y, outputs = 0 if bias is None else bias.data_ptr(), y.data_ptr(), y.shape[1]
    if box_rows:
        x_map = matrix_map(at_x, rows, inputs, stride, box_rows, half=x.dtype == torch.float16)
        own = (0, at_factor, at_bias, at_y, rows, outputs, tiles, 2 * chunks, at_scales, factor_step, across, along)
        multiply(x_map + rows_map(at_codes, filled, width) + _NO_MAPS + _MULTIPLY_BOXES.pack(*own))
        return
    multiply(
        _MULTIPLY.pack(
            at_x, at_codes, at_scales, 0, at_factor, at_bias, at_y, 0, stride, rows, outputs, inputs, tiles, chunks, 1,
            width, factor_step, across, along,
        )
    )  # fmt: skip


def _fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)


linear_rows = register(
    "linear_rows",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int outputs) -> Tensor",
    linear_rows_now,
    _fake,
)
"""`y [M, N] = x [M, K] @ W^T + bias` as one operator of torch, see `quantplug.rowlayout` for the tensors."""
