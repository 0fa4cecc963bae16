"""
The operators of torch that launch the kernels.
"""

from __future__ import annotations

from contextlib import nullcontext
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug_marlin.choice import choose
from quantplug_marlin.device import function, target_of
from quantplug_marlin.driver import Launch
from quantplug_marlin.form import Form, decode

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from quantplug_marlin.cut import Cut

_MULTIPLY = Struct("8Pq6i")
_GATHER = Struct("3P2q3i")
_SHARES = Struct("4P3i")
_DENSE = Struct("6P5i")

_OUT = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_THREADS = 256
_MOST_GRID_Y = 65535


class Way(NamedTuple):
    """How a product is launched: the launch, how many blocks share the chunks, and the launch that adds those sums."""

    multiply: Launch
    splits: int
    add: Launch | None


_ways: dict[tuple[object, ...], Way] = {}


def way(form: Form, cut: Cut | None, outputs: int, tiles: int, chunks: int, rows: int, device: int, stream: int) -> Way:
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
    found = function("multiply.cu", "multiply", {**form.definitions(), **cut.definitions()}, shared, device)
    launch = Launch(found, cut.grid(tiles, rows), cut.threads, shared, stream, overlap=target.clusters)
    if cut.splits == 1:
        return Way(launch, 1, None)
    adding = function("shares.cu", "add_shares", form.definitions(), 0, device)
    grid = (-(-outputs // _THREADS), min(rows, _MOST_GRID_Y), 1)
    return Way(launch, cut.splits, Launch(adding, grid, _THREADS, 0, stream, overlap=False))


def _linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None,
    factor: torch.Tensor | None, columns: torch.Tensor | None, bias: torch.Tensor | None, outputs: int, form: int,
) -> torch.Tensor:  # fmt: skip
    rows, device = x.shape[0], x.device.index
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    stream = torch.cuda.current_stream(device).cuda_stream
    with _on(device):
        x = _readable(x, columns, codes.shape[1] * 64, stream)
        # Grids are the same for up to eight rows.
        key = (
            form,
            x.dtype,
            None if scales is None else scales.dtype,
            outputs,
            codes.shape,
            -(-rows // 8),
            device,
            stream,
        )
        chosen = _ways.get(key)
        if chosen is None:
            stored = decode(form, half=x.dtype == torch.float16, scale=_name(scales))
            chosen = _ways[key] = way(stored, None, outputs, codes.shape[0], codes.shape[1], rows, device, stream)
        run(chosen, x, codes, scales, zeros, factor, bias, y)
    return y


def run(
    chosen: Way, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None,
    factor: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor,
) -> None:  # fmt: skip
    """Launch a product whose x the kernel can read as it is; see `prepare.py` for the other tensors."""
    rows, outputs = y.shape
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    shares = None
    if chosen.splits > 1:
        shares = torch.empty((chosen.splits, rows, outputs), dtype=torch.float32, device=y.device)
    tiles, chunks, _ = codes.shape
    chosen.multiply(
        _MULTIPLY.pack(
            x.data_ptr(), codes.data_ptr(), _at(scales), _at(zeros), _at(factor), _at(bias), y.data_ptr(), _at(shares),
            x.stride(0) * 2, rows, outputs, x.shape[1], tiles, chunks, 1 if scales is None else scales.shape[1],
        )
    )  # fmt: skip
    if chosen.add is not None:
        chosen.add(_SHARES.pack(_at(shares), _at(factor), _at(bias), y.data_ptr(), chosen.splits, rows, outputs))


def _readable(x: torch.Tensor, columns: torch.Tensor | None, slots: int, stream: int) -> torch.Tensor:
    """Return x as the kernel reads it: 16 bytes at a time, in the order of slots."""
    rows, inputs = x.shape
    if (
        columns is None
        and inputs % 8 == 0
        and (x.stride(1) == 1 or inputs == 1)
        and (x.stride(0) % 8 == 0 or rows == 1)
        and x.data_ptr() % 16 == 0
    ):
        return x
    gathered = torch.empty((rows, slots), dtype=x.dtype, device=x.device)
    found = function("gather.cu", "gather", {}, 0, x.device.index)
    launch = Launch(found, (-(-slots // _THREADS), min(rows, _MOST_GRID_Y), 1), _THREADS, 0, stream, overlap=False)
    launch(_GATHER.pack(x.data_ptr(), _at(columns), gathered.data_ptr(), x.stride(0), x.stride(1), rows, inputs, slots))
    return gathered


def _dequantize(
    codes: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None, factor: torch.Tensor | None,
    columns: torch.Tensor | None, outputs: int, inputs: int, form: int, half: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    device = codes.device.index
    values = torch.empty((outputs, inputs), dtype=dtype, device=codes.device)
    stored = decode(form, half=half, scale=_name(scales))
    tiles, chunks, _ = codes.shape
    with _on(device):
        found = function("dense.cu", "dequantize", {**stored.definitions(), "OUT": _OUT[dtype]}, 0, device)
        stream = torch.cuda.current_stream(device).cuda_stream
        launch = Launch(found, (-(-chunks // 8), tiles, 1), _THREADS, 0, stream, overlap=False)
        launch(
            _DENSE.pack(
                codes.data_ptr(), _at(scales), _at(zeros), _at(factor), _at(columns), values.data_ptr(),
                outputs, inputs, tiles, chunks, 1 if scales is None else scales.shape[1],
            )
        )  # fmt: skip
    return values


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _name(scales: torch.Tensor | None) -> str:
    return "" if scales is None else str(scales.dtype).removeprefix("torch.")


def _on(device: int) -> AbstractContextManager[object]:
    return nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device)


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


def _register(
    name: str, schema: str, function: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    qualified = f"quantplug_marlin::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CUDA", function)
    torch.library.register_fake(qualified, fake)
    operator: Callable[..., torch.Tensor] = getattr(torch.ops.quantplug_marlin, name).default
    return operator


_WEIGHT = "Tensor codes, Tensor? scales, Tensor? zeros, Tensor? factor, Tensor? columns"

linear = _register(
    "linear", f"(Tensor x, {_WEIGHT}, Tensor? bias, int outputs, int form) -> Tensor", _linear, _fake_linear
)
"""`y [M, N] = x [M, K] @ W^T + bias` as one operator of torch, see `prepare.py` for the tensors."""

dequantize = _register(
    "dequantize",
    f"({_WEIGHT}, int outputs, int inputs, int form, bool half, ScalarType dtype) -> Tensor",
    _dequantize,
    _fake_dequantize,
)
"""The values `[N, K]` in bfloat16, float16 or float32."""
