"""
What `expertlaunch.py` does, by ordinary operators of torch: where there is no Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.expertfunction import between as apply_function
from quantplug_cublas import plain
from quantplug_cublas.routed import Routed

if TYPE_CHECKING:
    from quantplug.moe import ExpertFunction

_FLOAT8 = torch.float8_e4m3fn


def route(ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, turns: int) -> Routed:
    """Put choices `[M, T]` in the order of the experts; each turn of an expert is a group."""
    numbers = ids.reshape(-1).to(torch.int64)
    if expert_map is not None:
        known = (numbers >= 0) & (numbers < len(expert_map))
        numbers = torch.where(known, expert_map[numbers.clamp(0, len(expert_map) - 1)], -1)
    local = torch.where((numbers >= 0) & (numbers < experts), numbers, experts)
    order = torch.argsort(local, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(local[order], torch.arange(experts, device=order.device), right=True)
    ends = torch.cat([turn * ends[-1] + ends for turn in range(turns)])
    return Routed(*(tensor.to(torch.int32) for tensor in (local, places, ends)))


def quantize(
    x: torch.Tensor, weights: torch.Tensor | None, known: torch.Tensor | None, routed: Routed, experts: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales, see `expertlaunch.quantize`."""
    top_k, turns = routed.local.numel() // x.shape[0], routed.ends.numel() // experts
    exact = x.to(torch.float32) if weights is None else x * weights
    if known is None:
        codes, scales = plain.by_tokens(exact, width, _FLOAT8)
        rows = [(codes.repeat_interleave(top_k, 0), scales.squeeze(1).repeat_interleave(top_k))]
    else:
        every = exact.repeat_interleave(top_k, 0)
        of_choices = known[:, routed.local.clamp(max=experts - 1)]
        rows = [(plain.by_scale(every, scales[:, None], width, _FLOAT8), scales) for scales in of_choices]
    codes = torch.empty(turns * len(routed.places), width, dtype=torch.uint8, device=x.device)
    scales = torch.empty(turns * len(routed.places), device=x.device)
    for turn, (own, scale) in enumerate(rows):
        at = _rows(routed, experts, turn)
        codes[at] = own.view(torch.uint8)
        scales[at] = scale
    return codes.view(_FLOAT8), scales


def activate(
    product: torch.Tensor, bias: torch.Tensor | None, known: torch.Tensor | None, routed: Routed, experts: int,
    between: int, width: int, function: ExpertFunction,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return codes and scales, see `expertlaunch.activate`."""
    parts, apart = 2 if function.gated else 1, routed.ends.numel() > experts
    sums = [
        product[_rows(routed, experts, part if apart else 0), 0 if apart else part * width :][:, :between].float()
        for part in range(parts)
    ]
    expert = routed.local.clamp(max=experts - 1)
    if bias is not None:
        sums = [each + own for each, own in zip(sums, bias[expert].chunk(parts, 1), strict=True)]
    h = apply_function(torch.cat(sums, 1), function)
    if known is None:
        own, scale = plain.by_tokens(h, width, _FLOAT8)
    else:
        scale = known[expert][:, None]
        own = plain.by_scale(h, scale, width, _FLOAT8)
    codes, scales = torch.empty_like(own.view(torch.uint8)), torch.empty_like(scale.squeeze(1))
    places = routed.places.to(torch.int64)
    codes[places] = own.view(torch.uint8)
    scales[places] = scale.squeeze(1)
    return codes.view(_FLOAT8), scales


def combine(
    outputs: torch.Tensor, weights: torch.Tensor | None, bias: torch.Tensor | None, routed: Routed, experts: int,
    rows: int, hidden: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return y `[M, H]`, see `expertlaunch.combine`."""
    values = outputs[routed.places, :hidden].to(torch.float32)
    if bias is not None:
        values = values + bias[routed.local.clamp(max=experts - 1)]
    if weights is not None:
        values = values * weights.reshape(-1, 1)
    values = torch.where((routed.local < experts)[:, None], values, 0.0).view(rows, -1, hidden)
    y = values[:, 0]
    for number in range(1, values.shape[1]):
        y = y + values[:, number]
    return y.to(dtype)


def _rows(routed: Routed, experts: int, turn: int) -> torch.Tensor:
    """Return where the choices of a turn lie: behind those of the turns before, nobody's behind all."""
    count, here, places = len(routed.places), routed.ends[experts - 1], routed.places.to(torch.int64)
    turns = routed.ends.numel() // experts
    behind = turns * here + turn * (count - here) + places - here
    return torch.where(routed.local == experts, behind, turn * here + places)
