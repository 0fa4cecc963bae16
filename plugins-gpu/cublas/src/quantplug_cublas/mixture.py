"""
The operator of torch that runs a mixture of experts: route, quantize, multiply, f and quantize, multiply, add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.moe import ExpertFunction
from quantplug.rowlayout import fill
from quantplug_cublas import expertplain
from quantplug_cublas.expertfit import MOST_GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.expertweights import PreparedExperts
    from quantplug.moe import FunctionName

try:
    from quantplug_cublas import expertlaunch
    from quantplug_cublas.launcher import INTERPRETED
except ImportError:  # Triton comes with torch on Linux only
    _LAUNCHES = False
else:
    _LAUNCHES = True

_MOST_CHOICES = 1 << 17
"""Choices that are multiplied together, so that what lies between the products of very many rows stays in bounds."""

_FEW, _MANY = 128, 2048


def apply(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
    *,
    fast: bool,
) -> torch.Tensor:
    """Return y `[M, H]` for a layer, see `MoEKernel.apply`; `fast` sums are never promoted to float32."""
    problem, tensors, f = prepared.problem, prepared.tensors, prepared.problem.function
    weights = [
        tensors.get(name)
        for product in ("13", "2")
        for name in (f"w{product}.codes", f"w{product}.scales", f"w{product}.x_scales", f"b{product}")
    ]
    return experts(
        x, topk_weights, topk_ids, expert_map, *weights, problem.intermediate, problem.router_weight_on_input,
        f.name, f.gated, f.limit, f.alpha, f.up_offset, fast,
    )  # fmt: skip


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    codes13: torch.Tensor, scales13: torch.Tensor, known13: torch.Tensor | None, bias13: torch.Tensor | None,
    codes2: torch.Tensor, scales2: torch.Tensor, known2: torch.Tensor | None, bias2: torch.Tensor | None,
    intermediate: int, weight_on_input: bool, name: FunctionName, gated: bool, limit: float | None, alpha: float,
    up_offset: float, fast: bool,
) -> torch.Tensor:  # fmt: skip
    rows, hidden = x.shape
    device = x.get_device()
    if device >= 0 and torch.cuda.current_device() != device:  # Triton launches where torch is
        with torch.cuda.device(device):
            return _experts(
                x, topk_weights, topk_ids, expert_map, codes13, scales13, known13, bias13, codes2, scales2, known2,
                bias2, intermediate, weight_on_input, name, gated, limit, alpha, up_offset, fast,
            )  # fmt: skip
    together = max(1, _MOST_CHOICES // topk_ids.shape[1])
    if rows == 0:
        return x.new_empty(0, hidden)
    if rows > together:
        goes = zip(x.split(together), topk_weights.split(together), topk_ids.split(together), strict=True)
        return torch.cat(
            [
                _experts(
                    *go, expert_map, codes13, scales13, known13, bias13, codes2, scales2, known2, bias2, intermediate,
                    weight_on_input, name, gated, limit, alpha, up_offset, fast,
                )
                for go in goes
            ]
        )  # fmt: skip
    ways = expertlaunch if _LAUNCHES and (x.is_cuda or INTERPRETED) else expertplain
    function = ExpertFunction(name, gated, limit, alpha, up_offset)
    count, between = codes2.shape[0], fill(intermediate)
    weights = topk_weights.to(torch.float32).contiguous()
    local_numbers = None if expert_map is None else expert_map.contiguous()
    before, behind = (weights, None) if weight_on_input else (None, weights)
    routed = ways.route(topk_ids.contiguous(), local_numbers, count, codes13.shape[0] // count)
    x_codes, x_scales = ways.quantize(x, before, known13, routed, count, codes13.shape[2])
    product = _multiply(x_codes, x_scales, codes13, scales13, routed.ends, fast=fast)
    h_codes, h_scales = ways.activate(product, bias13, known2, routed, count, intermediate, between, function)
    outputs = _multiply(h_codes, h_scales, codes2, scales2, routed.ends[:count], fast=fast)
    y: torch.Tensor = ways.combine(outputs, behind, bias2, routed, count, rows, hidden, x.dtype)
    return y


def _multiply(
    x: torch.Tensor, x_scales: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor, *,
    fast: bool,
) -> torch.Tensor:  # fmt: skip
    """
    Return bfloat16 `[rows, N]`; rows behind the last group's hold anything.

    torch chooses its tile by the rows that a group has on average. Groups without rows, which have a part of an
    expert's codes between the one before and the next, make it take the one for few.
    """
    (groups, outputs, inputs), steps = codes.shape, 1 if fast else _steps(len(x), *codes.shape)
    if steps > 1:
        count = steps * (groups - 1) + 1
        codes = codes.as_strided((count, outputs, inputs), (outputs * inputs // steps, inputs, 1))
        scales = scales.as_strided((count, outputs), (outputs // steps, 1))
        ends = ends.repeat_interleave(steps)[:count]
    return torch._scaled_grouped_mm(
        x, codes.transpose(1, 2), x_scales, scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def _steps(rows: int, groups: int, outputs: int, inputs: int) -> int:
    """
    Return in how many steps groups get from one expert's codes to the next: one, or a power of two that keeps torch
    from its tile of 128 x 256, where precise sums do not fit into registers.
    """
    steps = 1
    while _is_slow(rows // (steps * (groups - 1) + 1), outputs, inputs):
        steps *= 2
        if outputs % steps or steps * (groups - 1) >= MOST_GROUPS:
            return 1
    return steps


def _is_slow(rows: int, outputs: int, inputs: int) -> bool:
    """
    Return whether torch takes that tile for so many rows of a group.

    See `dispatch_fp8_grouped_gemm_on_tile_size` in `ScaledGroupMM.cu`, which torch 2.9 to 2.13 have alike.
    """
    return min(rows, outputs) > _FEW and sorted((rows, outputs, inputs))[1] < _MANY


def _fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_PRODUCT = "Tensor codes{0}, Tensor scales{0}, Tensor? known{0}, Tensor? bias{0}, "
_SCHEMA = (
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    + _PRODUCT.format("13")
    + _PRODUCT.format("2")
    + "int intermediate, bool weight_on_input, str name, bool gated, float? limit, float alpha, float up_offset, "
    "bool fast) -> Tensor"
)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define("quantplug_cublas::experts", _SCHEMA)
    # On the CPU only tests run it, which stand in for the product that torch does not have there.
    torch.library.impl("quantplug_cublas::experts", ("CUDA", "CPU"), _experts)
    torch.library.register_fake("quantplug_cublas::experts", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_cublas.experts.default
    return operator


experts = _register()
"""A layer of experts as one operator of torch, see `quantplug.expertrows` for the tensors."""
