"""
From canonical experts to the layout that the kernels read, and back.

Every projection is laid out as `prepare.py` says, by itself, and experts follow each other: `w13.codes` uint8
`[E, tiles, chunks, unit]` with the tiles of gate before those of up, `w13.scales`, `w13.zeros`, `w13.factor`
`[E, I or 2I]`, the same for `w2`; and where there are biases `b13` `[E, I or 2I]` and `b2` `[E, H]` in the problem's
dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.expertweights import ExpertWeights, PreparedExperts
from quantplug.weight import Prepared
from quantplug_marlin.expertfit import plain, projections
from quantplug_marlin.form import common
from quantplug_marlin.prepare import keep_promise, prepare
from quantplug_marlin.unpack import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug.moe import MoEProblem
    from quantplug.weight import Weight

_NAMES = ("codes", "scales", "zeros", "factor")


def prepare_experts(
    problem: MoEProblem,
    experts: Iterable[ExpertWeights],
    device: torch.device,
    layout_id: str,
    out: PreparedExperts | None,
) -> PreparedExperts:
    """Return the tensors above; `out` is overwritten in place."""
    tensors = {} if out is None else dict(out.tensors)
    meta: dict[str, int] = {"rounded": 0}
    dtype: torch.dtype = getattr(torch, problem.dtype)
    for number, expert in enumerate(experts):
        made = [
            prepare(plain(projection), [weight], device, layout_id, None)
            for projection, weight in zip(projections(problem), (*expert.w13, expert.w2), strict=True)
        ]
        for name, parts in (("w13", made[:-1]), ("w2", made[-1:])):
            for form in (part.meta["form.0"] for part in parts):
                if out is not None:
                    keep_promise(out.meta[f"{name}.form"], form)
                meta[f"{name}.form"] = common(meta.get(f"{name}.form", form), form)
            for kind in _NAMES:
                found = [part.tensors[f"{kind}.0"] for part in parts if f"{kind}.0" in part.tensors]
                if found:
                    _put(tensors, f"{name}.{kind}", torch.cat(found), number, problem.experts)
            meta |= {f"{name}.{fact}": parts[0].meta[f"{fact}.0"] for fact in ("width", "groups")}
        meta["rounded"] |= max(part.meta["rounded"] for part in made)
        if expert.b2 is not None:
            _put(tensors, "b13", torch.cat(expert.b13).to(device, dtype), number, problem.experts)
            _put(tensors, "b2", expert.b2.to(device, dtype), number, problem.experts)
    return PreparedExperts(layout_id, problem, tensors, meta) if out is None else out


def _put(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor, number: int, count: int) -> None:
    """Write one expert's part of a tensor, which is made with the first."""
    if name not in tensors:
        tensors[name] = value.new_empty((count, *value.shape))
    tensors[name][number].copy_(value)


def weights_of(prepared: PreparedExperts, expert: int) -> tuple[Weight, ...]:
    """Return one expert's projections, canonical, as they are held."""
    problem = prepared.problem
    every = [plain(projection) for projection in projections(problem)]
    places = [("w13", turn, len(problem.w13)) for turn in range(len(problem.w13))] + [("w2", 0, 1)]
    found: list[Weight] = []
    for projection, (name, turn, turns) in zip(every, places, strict=True):
        tensors = {
            f"{kind}.0": prepared.tensors[f"{name}.{kind}"][expert].chunk(turns)[turn]
            for kind in _NAMES
            if f"{name}.{kind}" in prepared.tensors
        }
        meta = {"rounded": 0, "parts": 1, "segments.0": 1, "rows.0": projection.out_features}
        meta |= {f"{fact}.0": prepared.meta[f"{name}.{fact}"] for fact in ("width", "groups", "form")}
        found.extend(canonical(Prepared(prepared.layout_id, projection, tensors, meta)))
    return tuple(found)


def unprepare_expert(prepared: PreparedExperts, expert: int) -> ExpertWeights:
    """
    Return one expert's canonical weights bit by bit.

    Raises:
        NotImplementedError: a float64 scale or factor was rounded to float32 on the way in.
    """
    if prepared.meta["rounded"]:
        raise NotImplementedError("kernel marlin.moe holds float64 scales in float32: there is no exact way back")
    *w13, w2 = weights_of(prepared, expert)
    return ExpertWeights(tuple(w13), w2)
