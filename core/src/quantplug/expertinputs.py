"""
What a layer of experts is called with, before a kernel reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import RunError

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem

_INTEGERS = (torch.int32, torch.int64)


def check_inputs(
    path: str,
    problem: MoEProblem,
    device: torch.device | None,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> None:
    """
    See that x `[..., H]`, the router's answers `[..., T]` and a map `[E_global]` are what kernels may rely on.

    Args:
        path: of the layer.
        problem: what it was prepared for.
        device: where its experts lie, None before there are any.
        x: in the problem's dtype.
        topk_weights: in any dtype.
        topk_ids: int32 or int64.
        expert_map: int32 or int64, or None.

    Raises:
        RunError: `QP-RUN-SHAPE`, `QP-RUN-DTYPE`, `QP-RUN-DEVICE`.
    """
    if x.shape[-1] != problem.hidden:
        raise RunError("QP-RUN-SHAPE", path, f"x is {list(x.shape)}", expected=f"[..., {problem.hidden}]")
    wanted = (*x.shape[:-1], problem.top_k)
    for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if tuple(tensor.shape) != wanted:
            what = f"{name} is {list(tensor.shape)}"
            raise RunError("QP-RUN-SHAPE", path, what, expected=f"{list(wanted)}, as x has it")
    dtype: torch.dtype = getattr(torch, problem.dtype)
    if x.dtype != dtype or topk_ids.dtype not in _INTEGERS:
        raise RunError(
            "QP-RUN-DTYPE", path, f"x is {x.dtype}, topk_ids {topk_ids.dtype}",
            expected=f"x in {dtype}, topk_ids in int32 or int64",
            fix="Cast them, or load with another dtype.",
        )  # fmt: skip
    if {x.device, topk_weights.device, topk_ids.device} != {device}:
        raise RunError(
            "QP-RUN-DEVICE", path,
            f"x lies on {x.device}, topk_weights on {topk_weights.device}, topk_ids on {topk_ids.device}",
            expected=f"all on {device}",
        )  # fmt: skip
    if expert_map is not None:
        _check_map(path, device, expert_map)


def _check_map(path: str, device: torch.device | None, expert_map: torch.Tensor) -> None:
    if expert_map.dim() != 1:
        what = f"expert_map is {list(expert_map.shape)}"
        raise RunError("QP-RUN-SHAPE", path, what, expected="[E_global], one number for each expert")
    if expert_map.dtype not in _INTEGERS:
        what = f"expert_map is {expert_map.dtype}"
        raise RunError("QP-RUN-DTYPE", path, what, expected="int32 or int64", fix="Cast it.")
    if expert_map.device != device:
        what = f"expert_map lies on {expert_map.device}"
        raise RunError("QP-RUN-DEVICE", path, what, expected=f"on {device}, where the experts are")
