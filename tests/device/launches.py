"""
Every way a kernel is launched, for the sanitizer to watch: `python -m tests.device.launches KERNEL TOOL`.

Layers are those in which each aspect of the kernel's conformance catalogue occurs: all types, odd sizes, act-order,
fused ones. Results are checked, too, so that what is watched is what the kernel is for.
"""

from __future__ import annotations

import sys

import torch

from quantplug.detect import detect
from quantplug.plugins import registry
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.conformance.experts import MoEKernelConformance

ROWS, EXPERT_ROWS = (1, 17, 64, 200), (1, 17, 70)
"""Those of the conformance tests, whose kernels a run of them has compiled."""
KINDS = ("mixed", "one-expert", "nowhere")


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


def launch_cuts(tool: str) -> int:
    """
    Run Marlin's products as every device cuts them: in clusters, shares and several tiles; return their number.

    Racecheck gets none in clusters. In such kernels, and no others, it reported on an H100 reads and writes that a
    barrier of the whole block lies between: as if the blocks of a cluster, each of which has memory of its own, were
    one. The kernel `clusters` in `planted.py` shows whether it still does.
    """
    from tests.device.test_marlin_layers import CUTS, test_every_way_to_cut_a_product_gives_it

    cuts = [cut for cut in CUTS if cut.shares == 1 or tool != "racecheck"]
    for cut in cuts:
        for name in ("int4", "mxfp8"):
            print(name, cut, flush=True)
            test_every_way_to_cut_a_product_gives_it(name, cut)
    return 2 * len(cuts)


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
