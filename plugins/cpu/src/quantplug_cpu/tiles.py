"""
Products with weights that are dequantized tile by tile: the way for many rows, for dtypes that the packed operator is
slow in, and for gradients.

A tile is a few hundred rows of the weight. It is unpacked, scaled in float32, rounded once to the dtype of x,
multiplied with all of x, and forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantplug_cpu.layout import halves, known, unpack
from quantplug_cpu.ops import differentiate, register
from quantplug_cpu.slots import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug_cpu.layout import Layout

# A tile of float32 that is near enough to the processor, and large enough that torch cuts its work for threads.
_TILE_WEIGHTS = 3 << 19
_MOST_ROWS = 1024
_LEAST_ROWS = 256


def tiles(rows: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Yield the (begin, end) of runs of rows, whole blocks."""
    step = _TILE_WEIGHTS // inputs // ROWS * ROWS
    step = min(max(step, _LEAST_ROWS), _MOST_ROWS)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _values(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    planes: int,
    rows: slice,
    layout: Layout,
) -> torch.Tensor:
    """Return the values float32 `[S, n]` of some rows, in the order of `halves`."""
    codes = unpack(packed, rows.start, rows.stop, planes, layout)
    groups = scales.shape[0]
    shape = (groups, codes.shape[0] // groups, codes.shape[1])
    offset: int | torch.Tensor = 8 if planes == 1 else 128
    if zeros is not None:
        offset = halves(zeros[:, rows], layout).reshape(groups, 1, -1)
    if planes == 1:
        # The difference of two nibbles fits a byte, which is a quarter of the work.
        if isinstance(offset, torch.Tensor):
            offset = offset.view(torch.int8)
        values = codes.view(torch.int8).view(shape).sub_(offset).to(torch.float32)
    else:
        values = codes.view(shape).to(torch.float32).sub_(offset)
    values.mul_(halves(scales[:, rows], layout).reshape(groups, 1, -1).to(torch.float32))
    return values.view(codes.shape)


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, planes: int
) -> torch.Tensor:
    """
    Return `[M, N]`, the product of x `[M, S]` with the dequantized weight, in the dtype of x.

    Args:
        x: bfloat16 or float32; 0 in empty slots.
        packed: uint8 `[N, planes * S / 2]` as the int4 operator wants it.
        scales: `[G, N]` in any float dtype, one per S / G inputs.
        zeros: uint8 `[G, N]`, the zero points of codes as they are packed, or None for the middle code.
        planes: 1 when codes are nibbles; 2 when inputs S … 2 S - 1 hold the lower halves of 8-bit codes.
    """
    layout = known()
    y = x.new_empty(x.shape[0], packed.shape[0])
    for begin, end in tiles(packed.shape[0], packed.shape[1] * 2):
        rows = slice(begin, end)
        product = torch.mm(x, _values(packed, scales, zeros, planes, rows, layout).to(x.dtype))
        target = halves(y[:, rows], layout)
        target.copy_(product.view(target.shape))
    return y


def packed_values(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, planes: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the dequantized weight `[S, N]`, rounded once to a dtype; operands as in `packed_linear`."""
    layout = known()
    values = torch.empty(packed.shape[1] * 2 // planes, packed.shape[0], dtype=dtype)
    for begin, end in tiles(packed.shape[0], packed.shape[1] * 2):
        rows = slice(begin, end)
        target = halves(values[:, rows], layout)
        target.copy_(_values(packed, scales, zeros, planes, rows, layout).view(target.shape))
    return values


def packed_codes(packed: torch.Tensor, planes: int) -> torch.Tensor:
    """Return the codes uint8 `[S, N]` as they are packed."""
    layout = known()
    codes = torch.empty(packed.shape[1] * 2 // planes, packed.shape[0], dtype=torch.uint8)
    for begin, end in tiles(packed.shape[0], packed.shape[1] * 2):
        target = halves(codes[:, begin:end], layout)
        target.copy_(unpack(packed, begin, end, planes, layout).view(target.shape))
    return codes


def _linear_fake(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, planes: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _values_fake(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, planes: int, dtype: torch.dtype
) -> torch.Tensor:
    return scales.new_empty(packed.shape[1] * 2 // planes, packed.shape[0], dtype=dtype)


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed, scales, zeros, planes = inputs
    ctx.save_for_backward(packed, scales, zeros)
    ctx.planes, ctx.dtype = planes, x.dtype


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    # The weight is dequantized once more rather than kept: that would be the dense model.
    values = _values_whole(*ctx.saved_tensors, ctx.planes, ctx.dtype)
    return torch.mm(grad, values.t()), None, None, None, None


linear_by_tiles = register(
    "packed_linear",
    "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, int planes) -> Tensor",
    packed_linear,
    _linear_fake,
)
_values_whole = register(
    "packed_values",
    "(Tensor packed, Tensor scales, Tensor? zeros, int planes, ScalarType dtype) -> Tensor",
    packed_values,
    _values_fake,
)
differentiate("packed_linear", _keep_operands, _linear_backward)
