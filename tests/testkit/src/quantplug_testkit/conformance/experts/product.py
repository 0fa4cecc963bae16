"""
The numbers: every result element by element against float64 of the dequantized operands, for every way to route rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts.case import ExpertSubject
from quantplug_testkit.conformance.experts.routing import Routing, scatter
from quantplug_testkit.conformance.poison import poisoned_memory

if TYPE_CHECKING:
    from quantplug_testkit.conformance.experts.case import ExpertCase
    from quantplug_testkit.conformance.experts.hazard import ExpertHazard

ROWS = (1, 17)
"""Numbers of rows M: the decoding step, and one more than a tile."""

_MANY = 70


class ExpertProductTests(ExpertSubject):
    """`apply`, on every routing."""

    def test_result_is_within_the_derived_bound(self, hazard: ExpertHazard, rows: int) -> None:
        """Each element of y is as near to the exact one as the declared arithmetic makes it; some slots are padding."""
        case = self.case(hazard)
        x = case.inputs(rows)
        for kind in ("spread", "mixed"):
            routing = case.route(rows, kind)
            case.check(x, routing, case.apply(x, routing), f"y for {rows} rows, {kind}")

    def test_no_rows_give_no_rows(self, family: ExpertHazard) -> None:
        """An x `[0, H]` gives y `[0, H]`."""
        case = self.case(family)
        case.apply(case.inputs(0), case.route(0))

    def test_all_rows_may_take_one_expert(self, family: ExpertHazard) -> None:
        """Every row goes to the last expert, more of them than a tile holds; the other slots are padding."""
        case = self.case(family)
        for rows in (1, _MANY):
            x, routing = case.inputs(rows), case.route(rows, "one-expert")
            case.check(x, routing, case.apply(x, routing), f"y for {rows} rows to one expert")

    def test_experts_without_rows_add_nothing(self, family: ExpertHazard) -> None:
        """The first and the last expert have none."""
        case = self.case(family)
        x, routing = case.inputs(17), case.route(17, "idle-ends")
        case.check(x, routing, case.apply(x, routing), "y with idle experts")

    def test_an_expert_named_twice_adds_twice(self, family: ExpertHazard) -> None:
        """All T slots of a row name the same expert, each with a weight of its own."""
        case = self.case(family)
        for rows in (1, 17):
            x, routing = case.inputs(rows), case.route(rows, "repeated")
            case.check(x, routing, case.apply(x, routing), f"y for {rows} rows with a repeated expert")

    def test_padding_gives_exactly_zero(self, family: ExpertHazard) -> None:
        """Rows without any expert are 0, whatever x and the router's weights hold there, and disturb no other row."""
        case = self.case(family)
        x, nowhere = case.inputs(9), case.route(9, "nowhere")
        nothing = torch.zeros_like(x)
        assert_bitwise_equal(case.apply(x, nowhere) + 0, nothing, f"y of padding [{family.name}]")
        routing = case.route(9, "spread")
        padded = Routing(routing.weights.clone(), routing.ids.clone())
        for holder, value in ((x, torch.nan), (padded.weights, torch.inf), (padded.ids, -1)):
            holder[::3] = value
        clean = x.clone()
        clean[::3] = 0
        y = case.apply(x, padded)
        assert_bitwise_equal(y[::3] + 0, nothing[::3], f"y of padded rows [{family.name}]")
        case.check(clean, padded, y, "y beside padded rows")

    def test_every_element_is_written(self, family: ExpertHazard) -> None:
        """With NaN in memory that was never written, results are still right, rows without experts included."""
        with poisoned_memory():
            case = self.case(family)
            for rows in (1, 17):
                x, routing = case.inputs(rows), case.route(rows)
                case.check(x, routing, case.apply(x, routing), f"y for {rows} rows on poisoned memory")

    def test_expert_map_says_which_experts_are_here(self, family: ExpertHazard) -> None:
        """Ids are numbers of a larger layer, some of whose experts are here, in another order."""
        case = self.case(family)
        for rows in (3, 17):
            x = case.inputs(rows)
            local = case.route(rows).to("cpu")
            for dtype in (torch.int64, torch.int32):
                routing = scatter(family, local).with_ids(dtype).to(case.device)
                case.check(x, routing, case.apply(x, routing), f"y for {rows} rows with a map in {dtype}")

    def test_ids_may_be_of_either_width(self, family: ExpertHazard) -> None:
        """int32 ids give what int64 ids give."""
        case = self.case(family)
        x, routing = case.inputs(17), case.route(17)
        narrow = case.apply(x, routing.with_ids(torch.int32))
        case.check_again(case.apply(x, routing), narrow, x, routing, "y for int32 ids")

    def test_router_weights_are_used_as_they_are(self, family: ExpertHazard) -> None:
        """Zero, negative, large and tiny weights, which float16 could not hold; nobody normalizes them."""
        case = self.case(family)
        x, routing = case.inputs(5), case.route(5, "spread")
        factors = torch.tensor([0.0, -3.0, 1.00001, 2.0**-30, 2.0**12], device=case.device)[:, None]
        if family.problem.dtype == "float16":
            factors[4] = 2.0**2
        odd = Routing((routing.weights * factors).contiguous(), routing.ids)
        case.check(x, odd, case.apply(x, odd), "y for odd weights")

    def test_nan_and_inf_stay_in_their_rows(self, family: ExpertHazard) -> None:
        """
        A row with NaN gives no finite number, one with Inf changes no other row.

        A stored scale may hide a NaN, and so may the comparison with a limit or with 0.
        """
        case = self.case(family)
        clean, routing = case.inputs(9), case.route(9, "spread")
        clean[1] = 0
        clean[3] = 0
        x = clean.clone()
        x[1, -1] = torch.nan
        x[3, 0] = torch.inf
        y, without = case.apply(x, routing), case.apply(clean, routing)
        shows = _shows_nan(case)
        assert not shows or y[1].isnan().all(), f"a NaN in x gives numbers in y [{family.name}]"
        others = [row for row in range(9) if row not in {1, 3}]
        kept = Routing(routing.weights[others], routing.ids[others])
        case.check_again(without[others], y[others], clean[others], kept, "the other rows")

    def test_small_inputs_are_within_the_bound(self, family: ExpertHazard) -> None:
        """Subnormal, tiny, and widely spread inputs lose no more than others do."""
        case = self.case(family)
        x, routing = case.inputs(5), case.route(5, "spread")
        info = torch.finfo(x.dtype)
        x[0] = info.smallest_normal / 2
        x[1] *= info.smallest_normal * 4
        x[2] *= 2.0**-10
        x[3] = 0
        x[4, ::2] *= 2.0**-8
        case.check(x, routing, case.apply(x, routing), "y for small inputs")


def _shows_nan(case: ExpertCase) -> bool:
    function, permission = case.hazard.problem.function, case.hazard.problem.activation
    compares = function.limit is not None or function.name in {"relu", "relu2"}
    return not compares and not (case.quantizes_x and permission is not None and not permission.dynamic)
