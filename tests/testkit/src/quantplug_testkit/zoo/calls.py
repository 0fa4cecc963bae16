"""
Kernels that go wrong because of when, where or how often they are called.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from quantplug_testkit.zoo.broken import Broken

if TYPE_CHECKING:
    from quantplug.weight import Prepared


class WritesIntoX(Broken):
    """Permutes x in place."""

    caught_by = ("test_apply_leaves_its_operands_alone",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Turn the caller's x round."""
        y = super().apply(x, prepared, bias)
        x.copy_(x.flip(-1).clone())
        return y


class ClobbersPrepared(Broken):
    """Unpacks the weights over themselves."""

    caught_by = ("test_apply_leaves_its_operands_alone",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Change the codes after their first use."""
        y = super().apply(x, prepared, bias)
        prepared.tensors["codes.0"].add_(1)
        return y


class StaleLastRow(Broken):
    """Keeps a workspace between calls, and takes the last row from the call before."""

    caught_by = ("test_results_do_not_depend_on_other_calls",)

    def __init__(self) -> None:
        self._last: dict[torch.Size, torch.Tensor] = {}

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the row that an earlier call of the same shape left behind."""
        y = super().apply(x, prepared, bias)
        if y.dim() == 2 and y.shape[0]:
            last = y[-1].clone()
            y[-1] = self._last.get(y.shape, last)
            self._last[y.shape] = last
        return y


class SharedResult(Broken):
    """Returns its own workspace, which the next call overwrites."""

    caught_by = ("test_results_do_not_depend_on_other_calls",)

    def __init__(self) -> None:
        self._results: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Copy the result into memory that is used again."""
        y = super().apply(x, prepared, bias)
        return self._results.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


class RandomOrder(Broken):
    """Adds up in an order that changes from call to call, and calls itself deterministic."""

    caught_by = ("test_same_input_gives_the_same_bits",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Shuffle the inputs."""
        order = torch.randperm(x.shape[-1])
        y = x.float()[..., order] @ self.dequantize(prepared, torch.float32)[:, order].t()
        return (y if bias is None else y + bias).to(x.dtype)


class LostPartition(Broken):
    """Divides the outputs among threads and loses the remainder."""

    caught_by = ("test_product_is_right_with_several_threads",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Clear the outputs that no thread took."""
        y = super().apply(x, prepared, bias)
        threads = torch.get_num_threads()
        y[..., y.shape[-1] // threads * threads :] = 0
        return y


class AnotherPathForInference(Broken):
    """Takes a shortcut under inference_mode that gives other bits."""

    caught_by = ("test_inference_mode_gives_the_same_bits",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Round the weight to bfloat16 there."""
        if not torch.is_inference_mode_enabled():
            return super().apply(x, prepared, bias)
        values = self.dequantize(prepared, torch.float32).bfloat16().float()
        return torch.nn.functional.linear(x.float(), values, None if bias is None else bias.float()).to(x.dtype)


class ThreadUnsafe(Broken):
    """Keeps the x of a call in an attribute while it works."""

    caught_by = ("test_threads_do_not_disturb_each_other",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Read x back after others had their turn."""
        self._x = x
        time.sleep(0.002)
        return super().apply(self._x, prepared, bias)


class NeedsItsOwnMemory(Broken):
    """Remembers addresses: what it prepared cannot be copied."""

    caught_by = ("test_deepcopy_is_independent",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Look the codes up by the address they had when they were prepared."""
        self._known = getattr(self, "_known", {})
        return super().apply(x, self._known.setdefault(str(prepared.problem), prepared), bias)


class BreaksTheGraph(Broken):
    """Looks at a value of x to choose its way, which no compiler can trace."""

    caught_by = ("test_compiles_into_one_graph", "test_compiles_to_machine_code")

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Return early when all inputs are zero."""
        if x.numel() and x.abs().sum().item() == 0:
            return super().apply(x, prepared, bias).zero_()
        return super().apply(x, prepared, bias)
