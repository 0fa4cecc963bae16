"""
Every way a kernel is launched, for the sanitizer to watch: `python -m tests.device.launches KERNEL TOOL`.

Layers are those in which each aspect of the kernel's conformance catalogue occurs: all types, odd sizes, act-order,
fused ones. Results are checked, too, so that what is watched is what the kernel is for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantplug.detect import detect
from quantplug.plugins import registry
from quantplug_marlin.cut import Cut
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.conformance.experts import MoEKernelConformance

if TYPE_CHECKING:
    from types import ModuleType


ROWS, EXPERT_ROWS = (1, 17, 64, 200), (1, 17, 70)
"""Those of the conformance tests, whose kernels a run of them has compiled."""
KINDS = ("mixed", "one-expert", "nowhere")

CUT = {
    "marlin.wna16": ("test_marlin_layers", ("int4", "mxfp8")),
    "marlin.w8.rows": ("test_marlin_rows", ("row", "block")),
    "marlin.moe.w8a8": ("test_marlin_float8_experts", ("bfloat16",)),
}
"""Kernels that are cut in many ways: the module whose tests try them, and the layers that they are tried on."""

EVEN = 48 * 64
"""
Inputs of which every group of warps of every cut has equally many chunks. Where one group takes nine and another eight,
and so meets once less, racecheck reports what the first writes and the second reads though a barrier of the whole block
lies between; with as many for each it reports nothing. It does the same with `barriers` in `planted.py`, which has no
fault: it seems to place a warp's accesses by how many barriers the warp has passed, of whatever number. (One H100,
2026-11-24.)
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


def inputs_of(cut: object, tool: str, usual: int) -> int:
    """Return for how many inputs a tool is given a way to cut a product: those that leave a remainder, see `EVEN`."""
    groups = isinstance(cut, Cut) and cut.warps_n > 1 and cut.warps_k > 1
    return EVEN if tool == "racecheck" and groups else usual


def launch_cuts(tests: ModuleType, layers: tuple[str, ...], tool: str) -> int:
    """
    Run Marlin's products as every device cuts them: in clusters, shares and several tiles; return their number.

    Args:
        tests: module that has the cuts, and the test of them.
        layers: names of those that it is given.
        tool: of the sanitizer.
    """
    for cut in tests.CUTS:
        for name in layers:
            print(name, cut, flush=True)
            tests.check_cut(name, cut, inputs_of(cut, tool, tests.K))
    return len(layers) * len(tests.CUTS)


def main(name: str, tool: str) -> int:
    """Launch the kernel of that name, for a tool to watch."""
    found, platform = registry(), detect(registry())
    settings = {"platform": platform, "device": "cuda"}
    if name in found.kernels:
        tests = type("Tests", (LinearKernelConformance,), {"kernel": found.kernel(name).item, **settings})()
        count = launch_linear(tests)
    else:
        tests = type("Tests", (MoEKernelConformance,), {"kernel": found.moe_kernel(name).item, **settings})()
        count = launch_experts(tests)
    if name in CUT:
        module, layers = CUT[name]
        # As pytest imports tests: with the helper modules beside them.
        sys.path.append(str(Path(__file__).parent))
        count += launch_cuts(import_module(module), layers, tool)
    torch.cuda.synchronize()
    print(f"{name}: {count} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
