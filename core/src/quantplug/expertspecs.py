"""
One numeric contract for all experts of a layer, and the parts of a joined projection: exact, or refused.

A kernel wants experts that are alike. Files may give each its own group size, and may store gate and up in one weight.
A scale that is shared by many elements may be repeated for fewer of them, and nothing changes; whatever else differs
between experts would have to be rounded.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from math import gcd
from typing import TYPE_CHECKING

from quantplug.spec import PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec, scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertrules import RowOrder
    from quantplug.spec import Granularity
    from quantplug.weight import Weight


def common_spec(specs: Iterable[WeightSpec]) -> WeightSpec | None:
    """
    Return the contract that all these can be brought to without rounding, None when there is none.

    Element types must agree. Scales of several granularities are repeated for the finest groups that divide all of
    them; scales of several dtypes become float32.
    """
    distinct = list(dict.fromkeys(specs))
    if len(distinct) == 1:
        return distinct[0]
    first = distinct[0]
    if len({spec.element for spec in distinct}) > 1:
        return None
    granularities = {spec.granularity for spec in distinct}
    act_order = any(spec.act_order for spec in distinct)
    if act_order and len(granularities) > 1:
        return None  # a group's members are listed, not counted; it has no halves
    dtypes = {spec.scale_dtype for spec in distinct}
    return replace(
        first,
        granularity=first.granularity if len(granularities) == 1 else _finest(granularities),
        scale_dtype=first.scale_dtype if len(dtypes) == 1 else "float32",
        act_order=act_order,
        global_scale=any(spec.global_scale for spec in distinct),
    )


def _finest(granularities: Iterable[Granularity]) -> Granularity:
    sizes = [g.k if isinstance(g, PerBlock) else g.size for g in granularities if isinstance(g, (PerBlock, PerGroup))]
    return PerGroup(reduce(gcd, sizes)) if sizes else PerChannel()


def half_spec(spec: WeightSpec, rows: int, order: RowOrder) -> WeightSpec:
    """
    Return the contract of gate, or up, once a joined weight of twice `rows` rows is cut in two.

    Tiles that lie across the cut have their scales repeated for each row.
    """
    granularity = spec.granularity
    if isinstance(granularity, PerBlock) and (order == "interleaved" or rows % granularity.n):
        return replace(spec, granularity=PerGroup(granularity.k))
    return spec


def halves(weight: Weight, order: RowOrder) -> tuple[Weight, Weight]:
    """Return gate and up of a joined weight `[2I, H]`, each under `half_spec`, as views where nothing is repeated."""
    rows = weight.out_features // 2
    fine = fit_weight(weight, half_spec(weight.spec, rows, order))
    gate, up = row_halves(2 * rows, order)
    return _rows(fine, gate), _rows(fine, up)


def row_halves(rows: int, order: RowOrder) -> tuple[slice, slice]:
    """Return which of so many joined rows are those of gate, and which those of up."""
    if order == "interleaved":
        return slice(0, rows, 2), slice(1, rows, 2)
    lower, upper = slice(0, rows // 2), slice(rows // 2, rows)
    return (upper, lower) if order == "up_gate" else (lower, upper)


def _rows(weight: Weight, cut: slice) -> Weight:
    granularity = weight.spec.granularity

    def shared(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(granularity, PerTensor):
            return tensor
        if isinstance(granularity, PerBlock):
            return tensor[cut.start // granularity.n : -(-cut.stop // granularity.n)]
        return tensor[cut]

    return replace(
        weight,
        codes=weight.codes[cut],
        scales=shared(weight.scales),
        zeros=None if weight.zeros is None else shared(weight.zeros),
    )


def fit_weight(weight: Weight, spec: WeightSpec) -> Weight:
    """
    Return a weight under a contract that `common_spec` or `half_spec` found for it; the same values.

    Raises:
        ValueError: the contract cannot be reached without rounding.
    """
    import torch

    if weight.spec == spec:
        return weight
    if common_spec((weight.spec, spec)) != spec:
        raise ValueError(f"{weight.spec.describe()} cannot become {spec.describe()} without rounding")
    scales, zeros = weight.scales, weight.zeros
    if weight.spec.granularity != spec.granularity:
        scales = _repeat(scales, weight, spec.granularity)
        zeros = None if zeros is None else _repeat(zeros, weight, spec.granularity)
    if weight.spec.scale_dtype != spec.scale_dtype:
        scales = scales.to(getattr(torch, spec.scale_dtype))
    factor = weight.global_scale
    if spec.global_scale and factor is None:
        factor = torch.ones((), dtype=torch.float32)
    return replace(weight, scales=scales, zeros=zeros, global_scale=factor, spec=spec)


def _repeat(shared: torch.Tensor, weight: Weight, target: Granularity) -> torch.Tensor:
    """Return scales or zero points `[N or blocks, G]` once for every row and every group of the target."""
    rows, columns = scale_shape(target, weight.out_features, weight.in_features)
    granularity = weight.spec.granularity
    if isinstance(granularity, PerBlock):
        shared = shared.repeat_interleave(granularity.n, 0)[: weight.out_features]
    shared = shared.expand(rows, -1)
    if isinstance(target, PerGroup) and isinstance(granularity, (PerGroup, PerBlock)):
        size = granularity.size if isinstance(granularity, PerGroup) else granularity.k
        return shared.repeat_interleave(size // target.size, 1)[:, :columns]
    return shared.expand(-1, columns)
