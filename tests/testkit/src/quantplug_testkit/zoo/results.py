"""
Kernels that read the weights rightly and compute or store the result wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_testkit.zoo.broken import Broken

if TYPE_CHECKING:
    from quantplug.weight import Prepared


class ZeroColumn(Broken):
    """One output is 0 for every row."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Clear the middle output."""
        y = super().apply(x, prepared, bias)
        y[..., y.shape[-1] // 2] = 0
        return y


class UnwrittenTile(Broken):
    """Launches one block too few, so that the last 16 outputs stay whatever the memory held."""

    caught_by = ("test_every_element_is_written",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Write all but the last tile."""
        y = super().apply(x, prepared, bias)
        result = torch.empty_like(y)
        result[..., :-16] = y[..., :-16]
        return result


class RowsBeyondATile(Broken):
    """Handles 128 rows and no more."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Clear the rows after the first 128."""
        y = super().apply(x, prepared, bias)
        y[128:] = 0
        return y


class HalfAccumulator(Broken):
    """Adds up in float16 and does not say so."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Add sixteen inputs at a time to a sum that is rounded each time."""
        values = self.dequantize(prepared, torch.float32)
        total = torch.zeros(*x.shape[:-1], values.shape[0], dtype=torch.float16)
        for start in range(0, x.shape[-1], 16):
            part = x[..., start : start + 16].float() @ values[:, start : start + 16].t()
            total = (total + part).half()
        return (total if bias is None else total + bias).to(x.dtype)


class BiasTwice(Broken):
    """Adds the bias in the product and again afterwards."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Add it a second time."""
        y = super().apply(x, prepared, bias)
        return y if bias is None else y + bias


class BiasForOneRow(Broken):
    """Adds the bias on the path for one row and forgets it on the other."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Drop the bias when there are several rows."""
        return super().apply(x, prepared, bias if x.numel() == x.shape[-1] else None)


class RoundedBeforeBias(Broken):
    """Rounds the product, then adds the bias and rounds again, and does not say so."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Round twice."""
        y = super().apply(x, prepared, None)
        return y if bias is None else y + bias


class Float32Result(Broken):
    """Returns the accumulator's dtype."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Skip the rounding."""
        return super().apply(x, prepared, bias).float()


class NoZeroRows(Broken):
    """Takes no rows for one row."""

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Return one row when there is none."""
        y = super().apply(x, prepared, bias)
        return y if y.numel() else y.new_zeros(1, y.shape[-1])


class FlattenedResult(Broken):
    """Forgets the leading dimensions of x."""

    caught_by = ("test_leading_dimensions_are_kept",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Return two dimensions for three."""
        y = super().apply(x, prepared, bias)
        return y.flatten(0, -2) if y.dim() > 2 else y


class ContiguousInput(Broken):
    """Reads x as if its rows lay one after the other."""

    caught_by = ("test_input_of_any_stride_is_read_right",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Start at x's first element and go on from there."""
        start = x.storage_offset()
        memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size() - start,), (1,), start)
        short = max(0, x.numel() - memory.numel())
        dense = torch.nn.functional.pad(memory, (0, short))[: x.numel()].view(x.shape)
        return super().apply(dense, prepared, bias)


class DividesByTheLargest(Broken):
    """Scales each row of x by its largest element, 0 by 0 included."""

    caught_by = ("test_zero_input_gives_exactly_the_bias",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Scale to 1 and back by powers of two, which is exact for all rows but those of zeros."""
        largest = 2.0 ** x.float().abs().amax(-1, keepdim=True).log2().ceil().clamp(min=-100)
        scale = torch.where(x.float().abs().amax(-1, keepdim=True) == 0, 0.0, largest)
        y = super().apply((x.float() / scale), prepared, None) * scale
        return (y if bias is None else y + bias).to(x.dtype)


class FlushedSmallInputs(Broken):
    """Takes small inputs for zero."""

    caught_by = ("test_small_and_large_inputs_are_within_the_bound",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Drop what is below a millionth."""
        return super().apply(x.masked_fill(x.abs() < 1e-6, 0), prepared, bias)


class ClampedInputs(Broken):
    """Passes x through float16's range."""

    caught_by = ("test_small_and_large_inputs_are_within_the_bound",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Cut off what float16 cannot hold."""
        return super().apply(x.clamp(-65504, 65504), prepared, bias)


class LeakingNaN(Broken):
    """Scales the whole batch by one number, so that a NaN in one row reaches all."""

    caught_by = ("test_nan_and_inf_stay_in_their_rows",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Add the largest element's share of nothing."""
        y = super().apply(x, prepared, bias)
        return y + 0 * x.abs().max() if x.numel() else y


class HiddenNaN(Broken):
    """Replaces what is not a number, so that nobody sees that something went wrong."""

    caught_by = ("test_nan_and_inf_stay_in_their_rows",)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Clean the result."""
        return super().apply(x, prepared, bias).nan_to_num()
