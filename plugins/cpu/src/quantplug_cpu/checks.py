"""
What weights must satisfy before operators that check nothing get to see them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import ElementType, PerBlock, PerGroup, scale_shape
from quantplug.weight import Prepared
from quantplug_cpu.fit import FAST_DTYPE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import Weight

    Place = tuple[tuple[int, ...], torch.dtype]


def check(segments: Sequence[Weight], in_features: int) -> None:
    """
    Check the shapes and dtypes that the operators rely on and do not check.

    Raises:
        ValueError: names the tensor, what it is and what it must be.
    """
    for weight in segments:
        if weight.scales.dtype != segments[0].scales.dtype:
            raise ValueError(f"scales are {segments[0].scales.dtype} and {weight.scales.dtype}")
        check_shapes(weight, in_features)


def check_shapes(weight: Weight, in_features: int) -> None:
    """
    Check that the tensors of a weight are what its contract says.

    Raises:
        ValueError: names the tensor, what it is and what it must be.
    """
    spec = weight.spec
    n, k = weight.codes.shape
    if k != in_features:
        raise ValueError(f"codes have {k} inputs, not {in_features}")
    wanted = _code_dtype(spec.element)
    if weight.codes.dtype != wanted:
        raise ValueError(f"codes are {weight.codes.dtype}, not {wanted}")
    rows, groups = scale_shape(spec.granularity, n, k)
    if weight.g_idx is not None:
        if not spec.act_order:
            raise ValueError(f"g_idx is there for {spec.describe()}")
        if isinstance(spec.granularity, (PerGroup, PerBlock)):
            groups = weight.scales.shape[1]
        _check_g_idx(weight.g_idx, k, groups)
    shape = (rows, groups)
    if weight.scales.shape != shape:
        raise ValueError(f"scales are {list(weight.scales.shape)}, not {list(shape)}")
    if (weight.zeros is None) != spec.element.signed:
        there = "missing" if weight.zeros is None else "there"
        raise ValueError(f"zero points are {there} for {spec.element}")
    if weight.zeros is not None and weight.zeros.shape != shape:
        raise ValueError(f"zero points are {list(weight.zeros.shape)}, not {list(shape)}")
    if (weight.global_scale is None) == spec.global_scale:
        raise ValueError(f"a global scale is {'missing' if spec.global_scale else 'there'} for {spec.describe()}")


def survives(segments: Sequence[Weight], held: torch.dtype) -> bool:
    """Return whether the scales of a layer come back from the dtype they are held in, bit by bit and as declared."""
    return all(
        str(weight.scales.dtype) == f"torch.{weight.spec.scale_dtype}"
        and torch.equal(weight.scales.to(held).to(weight.scales.dtype), weight.scales)
        for weight in segments
    )


def refuse_rounded(prepared: Prepared, kernel: str) -> None:
    """Raise `NotImplementedError` when scales were rounded on the way in."""
    if not bool(prepared.tensors["exact"]):
        raise NotImplementedError(f"kernel {kernel} holds the scales of this layer rounded to {FAST_DTYPE}")


def place(
    wanted: Mapping[str, Place], meta: Mapping[str, int], problem: LinearProblem, layout_id: str, out: Prepared | None
) -> Prepared:
    """
    Return where a layer goes: new memory, or that of an earlier result, which nothing has touched yet.

    Args:
        wanted: shape and dtype of each tensor.
        meta: the layer's plain facts.
        problem: what the kernel accepted.
        layout_id: of the kernel.
        out: the earlier result, or None.

    Raises:
        ValueError: the earlier result has other tensors, or other facts.
    """
    if out is None:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
        return Prepared(layout_id, problem, tensors, meta)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in out.tensors.items()}
    if found != wanted or out.meta != meta:
        raise ValueError("the new weights do not fit in place of the old ones: their inputs are grouped otherwise")
    return out


def _code_dtype(element: ElementType) -> torch.dtype:
    if element is ElementType.FLOAT4_E2M1FN or not element.signed:
        return torch.uint8
    dtype: torch.dtype = getattr(torch, element) if element.floating else torch.int8
    return dtype


def _check_g_idx(g_idx: torch.Tensor, inputs: int, groups: int) -> None:
    if g_idx.shape != (inputs,):
        raise ValueError(f"g_idx is {list(g_idx.shape)}, not {[inputs]}")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(f"g_idx leaves the {groups} groups that have scales")
