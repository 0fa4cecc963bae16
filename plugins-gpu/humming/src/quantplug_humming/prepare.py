"""
From canonical weights to humming's: codes as unsigned numbers in 32-bit words, scales in bfloat16, then its own
`transform`. Everything that humming makes of a weight is kept under its names: `weight`, `weight_scale`, `zero_point`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from quantplug.spec import PerBlock
from quantplug.weight import Prepared
from quantplug_humming.fit import ALIGNED, filled, group_size, one_scale
from quantplug_humming.locks import counters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import Weight


def prepare(
    problem: LinearProblem, segments: Sequence[Weight], device: torch.device, layout_id: str, out: Prepared | None
) -> Prepared:
    """Return humming's tensors for a layer whose segments share one contract; `out` is overwritten in place."""
    from humming.transform import transform_humming_tensors

    with torch.cuda.device(device):
        counters(torch.cuda.current_device())
        given = {name: tensor.to(device) for name, tensor in _tensors(problem, segments, device).items()}
        made = transform_humming_tensors(layer_config(problem, bias=False), given, already_padded=True)
    tensors = {name: made[name] for name in ("weight", "weight_scale", "zero_point") if name in made}
    if out is None:
        return Prepared(layout_id, problem, tensors)
    for name, tensor in tensors.items():
        out.tensors[name].copy_(tensor)
    return out


@cache
def layer_config(problem: LinearProblem, *, bias: bool) -> Any:
    """Return humming's description of a layer, for the GPU at hand."""
    from humming import dtypes
    from humming.config import LayerConfig

    weight, (rows, inputs) = problem.segments[0].weight, filled(problem)
    codes = "float8e4m3" if weight.element.floating else f"uint{weight.element.bits}"
    x_dtype = dtypes.DataType.from_str(problem.dtype)
    scale = dtypes.float8e8m0 if weight.scale_dtype == "float8_e8m0fnu" else x_dtype
    return LayerConfig(
        shape_n=rows,
        shape_k=inputs,
        pad_shape_n=(rows - problem.out_features) // ALIGNED * ALIGNED,
        pad_shape_k=(inputs - problem.in_features) // ALIGNED * ALIGNED,
        b_dtype=dtypes.DataType.from_str(codes),
        a_dtype=x_dtype,
        c_dtype=x_dtype,
        bs_dtype=dtypes.float32 if one_scale(problem) else scale,
        weight_scale_group_size=group_size(weight),
        weight_scale_type="tensor" if one_scale(problem) else None,
        has_zero_point=weight.zero_points,
        has_bias=bias,
    )


def _tensors(problem: LinearProblem, segments: Sequence[Weight], device: torch.device) -> dict[str, torch.Tensor]:
    """Return what humming's own schema stores, filled up with zeros."""
    from humming import ops

    spec, (rows, inputs) = problem.segments[0].weight, filled(problem)
    middle = 1 << (spec.element.bits - 1) if spec.element.signed and not spec.element.floating else 0
    # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
    codes = torch.cat([weight.codes.view(torch.uint8) for weight in segments]).to(device) + middle
    codes = _fill(codes, rows, inputs, middle)
    words = codes.view(torch.int32) if spec.element.bits == 8 else ops.pack_weight(codes.to(torch.int32), 4)
    tensors = {"weight": words}
    if one_scale(problem):
        tensors["weight_scale"] = segments[0].scales.to(torch.float32).reshape(1)
        return tensors
    groups = inputs // (group_size(spec) or inputs)
    scales = torch.cat([_for_rows(weight, weight.scales) for weight in segments]).to(device)
    if spec.scale_dtype == "float8_e8m0fnu":
        # Humming itself fills up with 2^-126.
        tensors["weight_scale"] = _fill(scales.view(torch.uint8), rows, groups, 1).view(torch.float8_e8m0fnu)
    else:
        tensors["weight_scale"] = _fill(scales.to(getattr(torch, problem.dtype)), rows, groups, 0)
    if spec.zero_points:
        zeros = torch.cat([weight.zeros for weight in segments if weight.zeros is not None]).to(device)
        columns = _fill(zeros, rows, groups, 0).to(torch.int32).t().contiguous()
        tensors["zero_point"] = ops.pack_weight(columns, spec.element.bits).t().contiguous()
    return tensors


def _for_rows(weight: Weight, shared: torch.Tensor) -> torch.Tensor:
    """Return scales with a row for each output."""
    if isinstance(weight.spec.granularity, PerBlock):
        return shared.repeat_interleave(weight.spec.granularity.n, 0)[: weight.out_features]
    return shared.expand(weight.out_features, -1)


def _fill(tensor: torch.Tensor, rows: int, columns: int, value: int) -> torch.Tensor:
    padding = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, padding, value=value).contiguous()
