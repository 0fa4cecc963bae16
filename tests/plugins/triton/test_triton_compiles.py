"""
What Triton's interpreter cannot see: that its compiler takes the kernels for experts, for GPUs that are not here.
"""

from __future__ import annotations

import pytest
from triton_compiling import compiled

pytest.importorskip("triton", reason="triton is installed on Linux only")

PROGRAM = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantplug_triton import expertdevice

POINTERS = {
    "ids_ptr": "*i64", "map_ptr": "*i32", "order_ptr": "*i32", "blocks_ptr": "*i32", "columns_ptr": "*i32",
    "x_ptr": "*bf16", "h_ptr": "*bf16", "y_ptr": "*bf16", "bias_ptr": "*bf16", "codes_ptr": "*u8", "zeros_ptr": "*u8",
    "weights_ptr": "*fp32", "factor_ptr": "*fp32", "o_ptr": "*fp32", "limit": "fp32", "alpha": "fp32",
    "up_offset": "fp32",
}
GIVEN = {"CHUNK": 64, "TILE_ROWS": 64, "BLOCK_M": 16, "BLOCK_N": 64, "EXACT": False, "ONE_GROUP": True}
# name, constants, dtype of scales
PRODUCTS = {
    "int4": ({"KIND": 1, "BITS": 4, "MIDDLE": 8}, "*fp16"),
    "uint4": ({"KIND": 0, "BITS": 4, "MIDDLE": 0}, "*fp16"),
    "mxfp4": ({"KIND": 4, "BITS": 4, "MIDDLE": 0}, "*u8"),
    "float8": ({"KIND": 2, "BITS": 8, "MIDDLE": 0}, "*fp32"),
}


def build(kernel, arch, constants, scales="*fp16"):
    types = POINTERS | {"scales_ptr": scales}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", arch, 32))
    print(kernel.__name__, arch, len(made.asm["cubin"]))


def gate_and_up(arch, form, name, parts, turns, *, more):
    constants, scales = PRODUCTS[form]
    build(expertdevice.gate_and_up, arch, GIVEN | constants | {
        "COLUMNS": more, "FACTOR": more, "BIAS": more, "ON_INPUT": more, "LIMITED": more, "PARTS": parts,
        "TURNS": turns, "NAME": name,
    }, scales)


def main(every):
    for arch in (80, 90) if every else (90,):
        build(expertdevice.route, arch, {"MAP": True, "BLOCK_M": 16, "BINS": 64, "BLOCK": 64})
        last = {"MAP": True, "SHARES": 2, "FACTOR": True, "BIAS": True, "ON_INPUT": False, "BLOCK": 256}
        build(expertdevice.combine, arch, last)
        gate_and_up(arch, "uint4", "silu", 1, 2, more=True)
        for form in PRODUCTS if every else ("int4",):
            build(expertdevice.down, arch, GIVEN | PRODUCTS[form][0] | {"COLUMNS": False}, PRODUCTS[form][1])
        if every:
            for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
                gate_and_up(arch, "int4", name, 1, 1, more=False)
            gate_and_up(arch, "mxfp4", "gelu", 1, 2, more=False)
            gate_and_up(arch, "float8", "gelu_tanh", 2, 1, more=True)


main(sys.argv[1] == "every")
"""


def test_each_kernel_is_compiled_for_compute_capability_9(tmp_path):
    assert {line.split()[0] for line in compiled(PROGRAM, "some", tmp_path)} == {
        "route",
        "combine",
        "gate_and_up",
        "down",
    }


@pytest.mark.slow
def test_every_function_and_format_is_compiled_for_both_generations(tmp_path):
    lines = compiled(PROGRAM, "every", tmp_path)
    assert {line.split()[1] for line in lines} == {"80", "90"}
    assert len(lines) == 28
