"""
The numbers: every result element by element against float64 of the dequantized operands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.case import Subject
from quantplug_testkit.conformance.poison import poisoned_memory
from quantplug_testkit.oracles.rounding import LARGEST

if TYPE_CHECKING:
    from quantplug_testkit.conformance.case import Case
    from quantplug_testkit.conformance.problems import Hazard

ROWS = (0, 1, 3, 17, 64, 200)
"""Numbers of rows M: none, the decoding step, a few, one more than a tile, a tile, many with a rest."""


class ProductTests(Subject):
    """`apply`, on well-behaved and on odd values."""

    def test_product_is_within_the_derived_bound(self, hazard: Hazard, rows: int) -> None:
        """Each element of y is as near to the exact product as the declared arithmetic makes it."""
        case = self.case(hazard)
        x = case.inputs(rows)
        case.check(x, case.apply(x), f"y for {rows} rows")

    def test_every_weight_is_used_at_its_place(self, hazard: Hazard) -> None:
        """With the identity as x, y is the weight itself, so that each single value is seen without any sum."""
        case = self.case(hazard)
        x = torch.eye(hazard.problem.in_features, dtype=getattr(torch, hazard.problem.dtype), device=case.device)
        case.check(x, case.apply(x), "y for the identity")

    def test_every_element_is_written(self, hazard: Hazard) -> None:
        """With NaN in memory that was never written, results are still right."""
        with poisoned_memory():
            case = self.case(hazard)
            for rows in (1, 17, 64):
                x = case.inputs(rows)
                case.check(x, case.apply(x), f"y for {rows} rows on poisoned memory")

    def test_zero_input_gives_exactly_the_bias(self, hazard: Hazard) -> None:
        """A zero x gives y = b to the bit, or 0, whatever the weights are; so does x = -0."""
        case = self.case(hazard)
        for rows in (1, 17):
            for x in (torch.zeros_like(case.inputs(rows)), -torch.zeros_like(case.inputs(rows))):
                y = case.apply(x)
                expected = torch.zeros_like(y) if case.bias is None else case.bias.expand_as(y)
                # adding 0 turns -0 into 0: both are exact
                assert_bitwise_equal(y + 0, expected + 0, f"y for x = 0 [{hazard.name}]")

    def test_small_and_large_inputs_are_within_the_bound(self, hazard: Hazard) -> None:
        """Subnormal, tiny, large and widely spread inputs lose no more than others do."""
        case = self.case(hazard)
        dtype = hazard.problem.dtype
        info = torch.finfo(getattr(torch, dtype))
        # a large value times the largest code still fits into float32
        large = LARGEST["float16"] if dtype == "float16" else 2.0**100
        x = case.inputs(6)
        x[0] = info.smallest_normal / 2
        x[1] *= info.smallest_normal * 4
        x[2] *= 2.0**-10
        x[3] = 0
        x[3, -1] = large
        x[4, ::2] *= 2.0**-8
        x[5, 0] = 2.0**8
        case.check(x, case.apply(x), "y for small and large inputs")

    def test_nan_and_inf_stay_in_their_rows(self, hazard: Hazard) -> None:
        """
        A row with NaN or Inf gives no finite number, and leaves all other rows as they were.

        Where x is quantized, a stored scale may hide both, and one scale for all rows may spread them.
        """
        case = self.case(hazard)
        shows, spreads = _faith_in_nan(case)
        for rows in (5, 64):
            clean = case.inputs(rows)
            clean[1] = 0
            clean[3] = 0
            x = clean.clone()
            x[1, -1] = float("nan")
            x[3, 0] = float("inf")
            y, without = case.apply(x), case.apply(clean)
            assert not shows or y[1].isnan().all(), f"a NaN in x gives numbers in y [{hazard.name}]"
            assert not shows or not y[3].isfinite().any(), f"an Inf in x gives finite numbers in y [{hazard.name}]"
            if not spreads:
                others = [row for row in range(rows) if row not in {1, 3}]
                what = f"the other of {rows} rows"
                case.check_again(without[others], y[others], clean[others], what)


def _faith_in_nan(case: Case) -> tuple[bool, bool]:
    """Whether NaN and Inf must show in their rows, and whether they may show in others."""
    permission = case.hazard.problem.activation
    if permission is None or not case.quantizes_x:
        return True, False
    return permission.dynamic, permission.dynamic and permission.granularity == "tensor"
