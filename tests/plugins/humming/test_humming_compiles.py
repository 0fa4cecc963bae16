"""
What Triton's interpreter cannot see: that its compiler takes the kernels around humming's, for GPUs that are not here.

A process of its own compiles, for the interpreter, once chosen, is there for good.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantplug_humming import expertdevice, routingdevice

POINTERS = {
    "ids_ptr": "*i64", "map_ptr": "*i32", "order_ptr": "*i32", "owners_ptr": "*i32", "total_ptr": "*i32",
    "locks_ptr": "*i32", "counts_ptr": "*i32", "cursors_ptr": "*i32", "product_ptr": "*bf16", "h_ptr": "*bf16",
    "y_ptr": "*bf16", "codes_ptr": "*fp8e4nv", "x_ptr": "*bf16", "scales_ptr": "*fp32", "weights_ptr": "*fp32",
    "limit": "fp32", "alpha": "fp32", "up_offset": "fp32",
}


def build(kernel, arch, constants):
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", arch, 32))
    print(kernel.__name__, arch, len(made.asm["cubin"]))


for arch in (80, 90):
    sizes = {"MAP": True, "BINS": 256}
    build(routingdevice.route, arch, sizes | {"BLOCK": 1024, "FILL": 32, "LOCKS": 2048})
    build(routingdevice.tally, arch, sizes | {"BLOCK": 1024})
    pieces = {"BLOCK": 1024, "PIECES": 32, "OWNERS": 16, "LOCKS": 2048}
    build(routingdevice.place, arch, sizes | pieces)
    build(expertdevice.combine, arch, {"MAP": True, "TOP_K": 8, "ON_INPUT": False, "BLOCK": 512})
for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
    gated = name != "relu2"
    build(expertdevice.between, 90, {"MAP": True, "GATED": gated, "LIMITED": gated, "NAME": name, "BLOCK": 512})
for grouped in (False, True):
    how = {"TOP": 448.0, "LEAST": 2.0**-126, "GROUPED": grouped, "SPREAD": True, "GROUPS": 16}
    build(expertdevice.quantize, 90, how)
    build(expertdevice.between_float8, 90, how | {"MAP": True, "GATED": True, "LIMITED": False, "NAME": "silu"})
"""


@pytest.mark.slow
def test_the_kernels_compile_where_no_gpu_is(tmp_path):
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    surroundings |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=surroundings, timeout=900
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        *["route", "tally", "place", "combine"] * 2, *["between"] * 5, *["quantize", "between_float8"] * 2,
    ]  # fmt: skip
    assert all(int(line[2]) > 0 for line in lines)
