"""
Kernels for experts that go wrong because of memory, strides, or when and how often they are called.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from quantplug_testkit.zoo.broken_experts import BrokenExperts

if TYPE_CHECKING:
    from quantplug.expertweights import PreparedExperts
    from quantplug.moe import MoEProblem


class Wrapped(BrokenExperts):
    """Calls the right kernel, and spoils what goes in or what comes out."""

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Return y."""
        return super().apply(x, weights, ids, prepared, self._map)

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep the map aside."""
        self._map = expert_map
        return self.call(x, topk_weights, topk_ids, prepared)

    def without(self, ids: torch.Tensor, problem: MoEProblem) -> torch.Tensor:
        """Return which rows `[M]` have no expert."""
        found = self.locate(ids, self._map, problem)
        return ~((found >= 0) & (found < problem.experts)).any(-1)


class UnwrittenRows(Wrapped):
    """Writes the rows that have an expert, and no others."""

    caught_by = ("test_every_element_is_written",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Leave the rest as memory had it."""
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        here = ~self.without(ids, prepared.problem)
        result[here] = super().call(x, weights, ids, prepared)[here]
        return result


class StaleRows(Wrapped):
    """Keeps its result, and leaves rows without an expert as an earlier call left them."""

    caught_by = ("test_results_do_not_depend_on_other_calls",)

    def __init__(self) -> None:
        self._results: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Take those rows from before."""
        y = super().call(x, weights, ids, prepared)
        before = self._results.get((y.shape, y.dtype), torch.zeros_like(y))
        y = torch.where(self.without(ids, prepared.problem)[:, None], before, y)
        self._results[y.shape, y.dtype] = y
        return y


class SharedResult(Wrapped):
    """Returns its own workspace, which the next call overwrites."""

    caught_by = ("test_results_do_not_depend_on_other_calls",)

    def __init__(self) -> None:
        self._results: dict[tuple[torch.Size, torch.dtype], torch.Tensor] = {}

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Copy the result into memory that is used again."""
        y = super().call(x, weights, ids, prepared)
        return self._results.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


class Float32Result(Wrapped):
    """Returns the accumulator's dtype."""

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Skip the rounding."""
        return super().call(x.float(), weights, ids, prepared)


class NoZeroRows(Wrapped):
    """Takes no rows for one row."""

    caught_by = ("test_no_rows_give_no_rows",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Return one row when there is none."""
        y = super().call(x, weights, ids, prepared)
        return y if y.numel() else y.new_zeros(1, y.shape[-1])


class ReadsBeyondX(Wrapped):
    """Loads whole tiles of x, and multiplies what lies behind the last column by weights of 0."""

    caught_by = ("test_input_of_any_stride_is_read_right",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Add nothing times the next element of each row, where there is one."""
        y = super().call(x, weights, ids, prepared)
        if x.shape[0] < 2 or x.stride(1) != 1 or x.stride(0) <= x.shape[1]:
            return y
        behind = x.as_strided((x.shape[0] - 1, 1), (x.stride(0), 1), x.storage_offset() + x.shape[1])
        y[:-1] += behind * 0
        return y


class ContiguousInput(Wrapped):
    """Reads x as if its rows lay one after the other."""

    caught_by = ("test_input_of_any_stride_is_read_right",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Start at x's first element and go on from there."""
        return super().call(_as_if_dense(x), weights, ids, prepared)


class ContiguousIds(Wrapped):
    """Reads ids as if their rows lay one after the other."""

    caught_by = ("test_routing_of_any_stride_is_read_right",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Start at the first one and go on from there."""
        return super().call(x, weights, _as_if_dense(ids), prepared)


class ContiguousWeightsOfTheRouter(Wrapped):
    """Reads the router's weights as if their rows lay one after the other."""

    caught_by = ("test_routing_of_any_stride_is_read_right",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Start at the first one and go on from there."""
        return super().call(x, _as_if_dense(weights), ids, prepared)


class WritesIntoX(Wrapped):
    """Multiplies x by the router's weight in place."""

    caught_by = ("test_apply_leaves_its_operands_alone",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Change the caller's x afterwards."""
        y = super().call(x, weights, ids, prepared)
        x *= 2
        return y


class WritesIntoIds(Wrapped):
    """Sorts the caller's ids."""

    caught_by = ("test_apply_leaves_its_operands_alone",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Put them in order afterwards."""
        y = super().call(x, weights, ids, prepared)
        ids.copy_(ids.sort(0, descending=True).values)
        return y


class LeakingNaN(Wrapped):
    """Scales the whole batch by one number, so that a NaN in one row reaches all."""

    caught_by = ("test_nan_and_inf_stay_in_their_rows",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Add the largest element's share of nothing."""
        y = super().call(x, weights, ids, prepared)
        return y + 0 * x.abs().max() if x.numel() else y


class HiddenNaN(Wrapped):
    """Replaces what is not a number, so that nobody sees that something went wrong."""

    caught_by = ("test_nan_and_inf_stay_in_their_rows",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Clean the result."""
        return super().call(x, weights, ids, prepared).nan_to_num()


class FlushedSmallInputs(Wrapped):
    """Takes small inputs for zero."""

    caught_by = ("test_small_inputs_are_within_the_bound",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Drop what is below a hundredth."""
        return super().call(x.masked_fill(x.abs() < 1e-2, 0), weights, ids, prepared)


class RandomOrder(BrokenExperts):
    """Adds up in an order that changes from call to call, and calls itself deterministic."""

    caught_by = ("test_same_input_gives_the_same_bits",)

    def expert(self, x: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Lose or gain a little by chance."""
        return super().expert(x, prepared, number) * (1 + 2.0**-6 * torch.rand(()))


class LostPartition(Wrapped):
    """Divides the rows among threads and loses the remainder."""

    caught_by = ("test_result_is_right_with_several_threads",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Clear the rows that no thread took."""
        y = super().call(x, weights, ids, prepared)
        y[y.shape[0] // torch.get_num_threads() * torch.get_num_threads() :] = 0
        return y


class AnotherPathForInference(BrokenExperts):
    """Takes a shortcut under inference_mode that gives other bits."""

    caught_by = ("test_inference_mode_gives_the_same_bits",)

    def expert(self, x: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Round what an expert gives there."""
        output = super().expert(x, prepared, number)
        return output.bfloat16().float() if torch.is_inference_mode_enabled() else output


class ThreadUnsafe(Wrapped):
    """Keeps the x of a call in an attribute while it works."""

    caught_by = ("test_threads_do_not_disturb_each_other",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Read x back after others had their turn."""
        self._x = x
        time.sleep(0.002)
        return super().call(self._x, weights, ids, prepared)


class BreaksTheGraph(Wrapped):
    """Looks at an id to choose its way, which no compiler can trace, and calls itself graph-safe."""

    caught_by = ("test_compiles_into_one_graph",)

    def call(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, prepared: PreparedExperts
    ) -> torch.Tensor:
        """Return early when nothing is to be done."""
        if ids.numel() and ids.max().item() < 0:
            return torch.zeros_like(x)
        return super().call(x, weights, ids, prepared)


def _as_if_dense(tensor: torch.Tensor) -> torch.Tensor:
    start = tensor.storage_offset()
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size() - start,), (1,), start)
    short = max(0, tensor.numel() - memory.numel())
    return torch.nn.functional.pad(memory, (0, short))[: tensor.numel()].view(tensor.shape)
