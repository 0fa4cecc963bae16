"""
A prepared layer, part by part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_marlin.choice import every_choice
from quantplug_marlin.device import build_all, target_of
from quantplug_marlin.form import Form, decode
from quantplug_marlin.launch import dense_definitions, linear_for, name_of
from quantplug_marlin.launch import dequantize as dequantize_part
from quantplug_marlin.unpack import canonical

if TYPE_CHECKING:
    from quantplug.weight import Prepared

_NAMES = ("codes", "scales", "zeros", "factor", "columns")


def form_of_part(prepared: Prepared, number: int) -> Form:
    """Return the stored form of a part."""
    half, scales = prepared.problem.dtype == "float16", prepared.tensors.get(f"scales.{number}")
    return decode(prepared.meta[f"form.{number}"], half=half, scale=name_of(scales))


def build(prepared: Prepared) -> None:
    """Have every kernel compiled and loaded that a call with this layer may need, so that no call compiles."""
    device = prepared.tensors["codes.0"].device.index
    target, wanted = target_of(device), {}
    for number in range(prepared.meta["parts"]):
        form = form_of_part(prepared, number)
        wanted["dense.cu", tuple(dense_definitions(form, prepared.problem.dtype).items())] = ("dequantize", 0)
        tiles, chunks, _ = prepared.tensors[f"codes.{number}"].shape
        for cut in every_choice(form, tiles, chunks, target):
            definitions = {**form.definitions(), **cut.definitions()}
            wanted[cut.file, tuple(definitions.items())] = ("multiply", cut.shared_bytes(form))
            if cut.splits > 1:
                wanted["shares.cu", tuple(form.definitions().items())] = ("add_shares", 0)
    wanted["gather.cu", ()] = ("gather", 0)
    build_all(wanted, device)


def apply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]`."""
    meta, tensors = prepared.meta, prepared.tensors
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if meta["parts"] == 1:
        held = tensors.get
        weight = held("codes.0"), held("scales.0"), held("zeros.0"), held("factor.0"), held("columns.0")
        y = linear_for(flat, bias)(flat, *weight, bias, meta["rows.0"], meta["form.0"])
    else:
        results, first, linear = [], 0, linear_for(flat, bias)
        for number in range(meta["parts"]):
            rows = meta[f"rows.{number}"]
            part = None if bias is None else bias[first : first + rows]
            of = (tensors.get(f"{name}.{number}") for name in _NAMES)
            results.append(linear(flat, *of, part, rows, meta[f"form.{number}"]))
            first += rows
        y = torch.cat(results, dim=1)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], prepared.problem.out_features)


def dequantize(prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
    """Return the values `[N, K]`."""
    if prepared.tensors["codes.0"].device.type != "cuda":
        return torch.cat([weight.dequantize(dtype) for weight in canonical(prepared)])
    parts = [
        dequantize_part(
            *(prepared.tensors.get(f"{name}.{number}") for name in _NAMES),
            prepared.meta[f"rows.{number}"],
            prepared.problem.in_features,
            prepared.meta[f"form.{number}"],
            prepared.problem.dtype == "float16",
            dtype,
        )
        for number in range(prepared.meta["parts"])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
