"""
From canonical weights to humming's: codes as unsigned numbers in 32-bit words, scales in bfloat16, then its own
`transform`. Everything that humming makes of a weight is kept under its names: `weight`, `weight_scale`, `zero_point`.

humming wants a bias in an order of its own, and a linear layer's arrives with each call: `bias_order` int32 `[N]`, as
filled up, is where each of its elements comes from.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from quantplug.spec import PerBlock
from quantplug.weight import Prepared
from quantplug_humming.fit import DTYPE
from quantplug_humming.form import ALIGNED, PROMOTED, Form, form_of
from quantplug_humming.locks import counters
from quantplug_humming.smallest import raise_smallest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from quantplug.spec import LinearProblem
    from quantplug.weight import Weight

NAMES = ("weight", "weight_scale", "zero_point")
"""What humming makes of a weight; the last for weights with zero points only."""

FLOAT8 = "float8e4m3"
"""float8_e4m3fn, as humming spells it."""


def prepare(
    problem: LinearProblem, segments: Sequence[Weight], device: torch.device, layout_id: str, out: Prepared | None
) -> Prepared:
    """Return humming's tensors for a layer whose segments share one contract; `out` is overwritten in place."""
    form = form_of(problem)
    with on(device):
        if device.type == "cuda":
            counters(torch.cuda.current_device())
        tensors = transform(problem, form, segments, device)
        if problem.bias:
            tensors["bias_order"] = bias_order(form, device)
    return Prepared(layout_id, problem, tensors, form._asdict()).into(out)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Return what makes a GPU the current one; the CPU is asked for in tests, by a stand-in for humming."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def transform(
    problem: LinearProblem, form: Form, segments: Sequence[Weight], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return humming's tensors of one weight. A segment may have fewer rows and inputs than the problem says."""
    from humming.transform import transform_humming_tensors

    given = _tensors(problem, form, segments, device)
    made = transform_humming_tensors(layer_config(form), given, already_padded=True)
    return {name: made[name] for name in NAMES if name in made}


def bias_order(form: Form, device: torch.device) -> torch.Tensor:
    """Return the outputs in humming's order of a bias; those that fill up take the first one's, and are cut off."""
    from humming.transform import transform_humming_bias

    order: torch.Tensor = transform_humming_bias(torch.arange(form.filled[0], dtype=torch.int32, device=device))
    return order.where(order < form.outputs, 0).contiguous()


@cache
def layer_config(form: Form, *, bias: bool = False, experts: int = 0) -> Any:
    """Return humming's description of a layer, for the GPU at hand."""
    from humming import dtypes
    from humming.config import LayerConfig

    rows, inputs = form.filled
    codes = f"uint{form.bits}" if not form.floating else "float4e2m1" if form.bits == 4 else FLOAT8
    dtype = dtypes.DataType.from_str(DTYPE)
    scale = dtypes.float8e8m0 if form.powers else dtype
    in_groups = form.float8 and (form.block or form.promoted)
    return LayerConfig(
        shape_n=rows,
        shape_k=inputs,
        pad_shape_n=(rows - form.outputs) // ALIGNED * ALIGNED,
        # Who quantizes x fills it up as well.
        pad_shape_k=0 if form.float8 else (inputs - form.inputs) // ALIGNED * ALIGNED,
        num_experts=experts,
        b_dtype=dtypes.DataType.from_str(codes),
        a_dtype=dtypes.DataType.from_str(FLOAT8) if form.float8 else dtype,
        c_dtype=dtype,
        bs_dtype=dtypes.float32 if form.single or form.block else scale,
        input_scale_group_size=PROMOTED if in_groups else 0,
        weight_scale_group_size=form.group,
        weight_scale_group_size_n=form.block,
        weight_scale_type="tensor" if form.single else None,
        has_zero_point=bool(form.zeros),
        has_bias=bias,
    )


def _tensors(
    problem: LinearProblem, form: Form, segments: Sequence[Weight], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return what humming's own schema stores, filled up with zeros."""
    from humming import ops

    spec = problem.segments[0].weight
    rows, inputs = form.filled
    groups = inputs // (form.group or inputs)
    sizes = [segment.out_features for segment in problem.segments]
    middle = 1 << (form.bits - 1) if spec.element.signed and not form.floating else 0
    # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
    codes = [weight.codes.view(torch.uint8).to(device) + middle for weight in segments]
    scales = [(weight.scales if form.block else _for_rows(weight, weight.scales)).to(device) for weight in segments]
    if form.powers:
        made = [
            raise_smallest(each, scale.view(torch.uint8), form.group, spec.element)
            for each, scale in zip(codes, scales, strict=True)
        ]
        codes, scales = [each for each, _ in made], [scale for _, scale in made]
    held = _stack(codes, sizes, rows, inputs, middle)
    tensors = {"weight": held.view(torch.int32) if form.bits == 8 else ops.pack_weight(held.to(torch.int32), 4)}
    if form.single:
        tensors["weight_scale"] = segments[0].scales.to(device, torch.float32).reshape(1)
        return tensors
    if form.block:
        blocks = [size // form.block for size in sizes[:-1]]
        blocks.append(rows // form.block - sum(blocks))
        exact = [scale.to(torch.float32) for scale in scales]
        tensors["weight_scale"] = _stack(exact, blocks, rows // form.block, groups, 0)
    elif form.powers:
        # Humming itself fills up with 2^-126.
        tensors["weight_scale"] = _stack(scales, sizes, rows, groups, 1).view(torch.float8_e8m0fnu)
    else:
        dtype: torch.dtype = getattr(torch, DTYPE)
        tensors["weight_scale"] = _stack([scale.to(dtype) for scale in scales], sizes, rows, groups, 0)
    if form.zeros:
        zeros = [_for_rows(weight, weight.zeros).to(device) for weight in segments if weight.zeros is not None]
        columns = _stack(zeros, sizes, rows, groups, 0).to(torch.int32).t().contiguous()
        tensors["zero_point"] = ops.pack_weight(columns, form.bits).t().contiguous()
    return tensors


def _for_rows(weight: Weight, shared: torch.Tensor) -> torch.Tensor:
    """Return scales or zero points with a row for each output."""
    if isinstance(weight.spec.granularity, PerBlock):
        return shared.repeat_interleave(weight.spec.granularity.n, 0)[: weight.out_features]
    return shared.expand(weight.out_features, -1)


def _stack(parts: Sequence[torch.Tensor], sizes: Sequence[int], rows: int, columns: int, value: int) -> torch.Tensor:
    """Return parts one below the other, each filled up to its size, and the whole to `[rows, columns]`."""
    made = torch.cat([_fill(part, size, columns, value) for part, size in zip(parts, sizes, strict=True)])
    return _fill(made, rows, columns, value)


def _fill(tensor: torch.Tensor, rows: int, columns: int, value: int) -> torch.Tensor:
    padding = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, padding, value=value).contiguous() if any(padding) else tensor
