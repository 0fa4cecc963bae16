"""
Every kernel for experts at hand, with more rows than the conformance class takes: full blocks, many of them, and more
choices than one launch puts in order.
"""

from __future__ import annotations

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.moeloop import PREFIX
from quantplug.platform import Platform
from quantplug.plugins import registry
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.case import ExpertCase

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: torch.cuda.is_available() is False here", allow_module_level=True)

GPU = Platform.parse("cuda:{}.{}".format(*torch.cuda.get_device_capability()))
KERNELS = {name: provided.item for name, provided in registry().moe_kernels.items() if not name.startswith(PREFIX)}
ROWS = {
    "tiles-int4-group128": (70, 600),
    "tiles-mxfp8": (70, 600),
    "tiles-nvfp4": (70, 600),
    "act-order-bias": (70, 600),
    "bias": (70, 600),
    "x-float8-tiles": (70, 600),
    "swigluoai": (70, 600),
    "one-expert": (300, 2000),
    "all-of-three": (300, 2000),
    "four-of-forty": (70, 300, 2000),
}
HAZARDS = {h.family: h for h in EXPERT_CATALOGUE if h.family in ROWS and h.problem.dtype == "bfloat16"}
CASES = [
    pytest.param(kernel, family, rows, id=f"{name}-{family}-{rows}")
    for name, kernel in sorted(KERNELS.items())
    for family, hazard in HAZARDS.items()
    if isinstance(kernel.supports(hazard.problem, GPU), Accepted)
    for rows in ROWS[family]
]


@pytest.mark.parametrize(("kernel", "family", "rows"), CASES)
def test_any_number_of_rows_is_within_the_bound(kernel: object, family: str, rows: int) -> None:
    case = ExpertCase(kernel, GPU, torch.device("cuda"), HAZARDS[family])
    x, routing = case.inputs(rows), case.route(rows)
    case.check(x, routing, case.apply(x, routing), f"{rows} rows")


def test_every_family_is_one_of_the_catalogue() -> None:
    assert HAZARDS.keys() == ROWS.keys()
