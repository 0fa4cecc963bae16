"""
From canonical experts to humming's: what its `transform` makes of each expert's products, one behind the other.

`w13.weight`, `w13.weight_scale`, `w13.zero_point` `[E, …]` and the same for `w2`; where there are biases `w13.bias` and
`w2.bias` in the order that humming wants them in. Gate lies before up, each filled up as `expertfit.products` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.expertweights import PreparedExperts
from quantplug_humming.expertfit import forms_of, products
from quantplug_humming.fit import DTYPE
from quantplug_humming.prepare import on, transform

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantplug.expertweights import ExpertWeights
    from quantplug.moe import MoEProblem
    from quantplug.spec import LinearProblem
    from quantplug_humming.form import Form


def prepare_experts(
    problem: MoEProblem,
    experts: Iterable[ExpertWeights],
    device: torch.device,
    layout_id: str,
    out: PreparedExperts | None,
    *,
    float8: bool = False,
) -> PreparedExperts:
    """Return the tensors above for x in bfloat16 or in float8_e4m3fn; `out` is overwritten in place."""
    (first, second), (form13, form2) = products(problem), forms_of(problem, float8=float8)
    tensors = {} if out is None else dict(out.tensors)
    with on(device):
        for number, expert in enumerate(experts):
            made = {f"w13.{name}": each for name, each in transform(first, form13, expert.w13, device).items()}
            made |= {f"w2.{name}": each for name, each in transform(second, form2, [expert.w2], device).items()}
            if expert.b2 is not None:
                made["w13.bias"] = _bias(first, form13, expert.b13, device)
                made["w2.bias"] = _bias(second, form2, [expert.b2], device)
            for name, tensor in made.items():
                _put(tensors, name, tensor, number, problem.experts)
    if out is not None:
        return out
    meta = {f"w13.{name}": fact for name, fact in form13._asdict().items()}
    meta |= {f"w2.{name}": fact for name, fact in form2._asdict().items()}
    return PreparedExperts(layout_id, problem, tensors, meta)


def _bias(product: LinearProblem, form: Form, parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return biases of a product's segments, filled up as its rows are, and in humming's order."""
    from humming.transform import transform_humming_bias

    dtype: torch.dtype = getattr(torch, DTYPE)
    filled = torch.zeros(form.filled[0], dtype=dtype, device=device)
    start = 0
    for segment, part in zip(product.segments, parts, strict=True):
        filled[start : start + len(part)] = part.to(device, dtype)
        start += segment.out_features
    held: torch.Tensor = transform_humming_bias(filled)
    return held


def _put(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor, number: int, count: int) -> None:
    """Write one expert's part of a tensor, which is made with the first; single scales have no axis of their own."""
    shape = () if value.shape == (1,) else value.shape
    if name not in tensors:
        tensors[name] = value.new_empty((count, *shape))
    tensors[name][number].copy_(value.view(shape))
