"""
Every way a kernel is launched, for the sanitizer to watch: `python -m tests.device.launches KERNEL TOOL`.

Layers are those in which each aspect of the kernel's conformance catalogue occurs: all types, odd sizes, act-order,
fused ones. Results are checked, too, so that what is watched is what the kernel is for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from quantplug.detect import detect
from quantplug.plugins import registry
from quantplug_marlin.cut import Cut
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.conformance.experts import MoEKernelConformance

if TYPE_CHECKING:
    from quantplug_marlin.cut import GroupCut

ROWS, EXPERT_ROWS = (1, 17, 64, 200), (1, 17, 70)
"""Those of the conformance tests, whose kernels a run of them has compiled."""
KINDS = ("mixed", "one-expert", "nowhere")

LEFT_OUT = "left out:"
WHY = "groups of warps pass named barriers unequally often, which racecheck seems to miscount"
"""
What racecheck reported on an H100 (2026-11-24) in `multiply.cu`, in `Cut(2, 64, 4, 2, 4)`: what warps of the first
group write and those of the second read, with a barrier of the whole block between, in the machine code, too. Of 17
chunks the first group takes 9 and the second 8, and meets once less. It fits that a warp's accesses are placed by how
many barriers it has passed, of whatever number: the first group writes after ten and the second reads after ten. The
other direction (nine and eleven) was not reported, nor were layers of two chunks, one for each group, or warps that are
a group each and have no such barrier. That is an inference; `planted.py` has kernels that show whether it holds.
"""


def launch_linear(tests: LinearKernelConformance) -> int:
    """Run some numbers of rows of each layer, x of any stride, and what dequantizes; return the number of layers."""
    layers = tests.given(("family",), whole=False)
    for (hazard,) in layers:
        print(hazard.name, flush=True)
        case = tests.case(hazard)
        for rows in ROWS:
            x = case.inputs(rows)
            case.check(x, case.apply(x), f"{rows} rows")
        tests.test_input_of_any_stride_is_read_right(hazard)
        try:
            case.kernel.dequantize(case.prepared, torch.bfloat16)
        except NotImplementedError:
            continue
    return len(layers)


def launch_experts(tests: MoEKernelConformance) -> int:
    """Run each way to route some numbers of rows, x and routing of any stride; return the number of layers."""
    layers = tests.given(("form",), whole=False)
    for (hazard,) in layers:
        print(hazard.name, flush=True)
        case = tests.case(hazard)
        for rows in EXPERT_ROWS:
            for kind in KINDS:
                x, routing = case.inputs(rows), case.route(rows, kind)
                case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")
        tests.test_input_of_any_stride_is_read_right(hazard)
        tests.test_routing_of_any_stride_is_read_right(hazard)
    return len(layers)


def is_left_out(cut: Cut | GroupCut, tool: str) -> bool:
    """Whether a tool is not given a way to cut a product, see `WHY`."""
    return tool == "racecheck" and isinstance(cut, Cut) and cut.warps_n > 1 and cut.warps_k > 1


def launch_cuts(tool: str) -> int:
    """
    Run Marlin's products as every device cuts them: in clusters, shares and several tiles; return their number.

    Those that the tool is not given are printed, each in a line that begins with `LEFT_OUT`.
    """
    from tests.device.test_marlin_layers import CUTS, test_every_way_to_cut_a_product_gives_it

    count = 0
    for cut in CUTS:
        if is_left_out(cut, tool):
            print(f"{LEFT_OUT} {cut}: {WHY}", flush=True)
            continue
        for name in ("int4", "mxfp8"):
            print(name, cut, flush=True)
            test_every_way_to_cut_a_product_gives_it(name, cut)
            count += 1
    return count


def main(name: str, tool: str) -> int:
    """Launch the kernel of that name, for a tool to watch."""
    found, platform = registry(), detect(registry())
    settings = {"platform": platform, "device": "cuda"}
    if name in found.kernels:
        tests = type("Tests", (LinearKernelConformance,), {"kernel": found.kernel(name).item, **settings})()
        count = launch_linear(tests)
        if name == "marlin.wna16":
            count += launch_cuts(tool)
    else:
        tests = type("Tests", (MoEKernelConformance,), {"kernel": found.moe_kernel(name).item, **settings})()
        count = launch_experts(tests)
    torch.cuda.synchronize()
    print(f"{name}: {count} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
