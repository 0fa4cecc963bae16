"""That Triton's compiler takes the kernels for a quantized x, for GPUs that are not here, and how it sums FP8 there."""

from __future__ import annotations

import pytest
from triton_compiling import compiled

pytest.importorskip("triton", reason="triton is installed on Linux only")

PROGRAM = """
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantplug_triton import quantizedevice, w8a8device
from quantplug_triton.grids import GRIDS

POINTERS = {"x_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16", "x_scales_ptr": "*fp32", "scales_ptr": "*fp32"}
E4M3, E5M2, E2M1, INT8 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8"
# type of x: what holds it natively, in a program and in memory, and whether rounding to that is not enough
X = {
    E4M3: (tl.float8e4nv, "*fp8e4nv", False),
    E5M2: (tl.float8e5, "*fp8e5", False),
    E2M1: (tl.float8e4nv, "*fp8e4nv", True),
    INT8: (tl.int8, "*i8", True),
}
# type of a weight: KIND, BITS, MIDDLE, and its codes in memory
WEIGHTS = {
    E4M3: (2, 8, 0, "*fp8e4nv"), E5M2: (3, 8, 0, "*fp8e5"), E2M1: (4, 4, 0, "*u8"), "int4": (1, 4, 8, "*u8"),
    INT8: (1, 8, 128, "*i8"),
}


def make(kernel, arch, types, constants, warps):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps}
    return triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", arch, 32), options=options)


def rounding(x, arch):
    grid = GRIDS[x]
    native = x == INT8 or arch in (89, 90)
    held, pointer, rounded = X[x] if native else (tl.bfloat16, "*bf16", True)
    names = {"TOP": grid.top, "BOTTOM": grid.bottom, "FRACTION": grid.fraction, "LEAST": grid.least, "ROUND": rounded}
    return names, held, pointer, grid.exponent


def product(arch, x, weight, shared, fused, rows=16, outputs=64, warps=4):
    names, held, pointer, exponent = rounding(x, arch)
    kind, bits, middle, codes = WEIGHTS[weight]
    scales = "*u8" if shared == "power" else "*fp32"
    types = POINTERS | {"codes_ptr": "*u8" if held == tl.bfloat16 else codes, "scales_ptr": scales}
    types |= {"x_scales_ptr": scales} | ({} if fused else {"x_ptr": pointer})
    grouped = shared in ("group", "power")
    made = make(w8a8device.multiply_quantized, arch, types, names | {
        "KIND": kind, "BITS": bits, "MIDDLE": middle, "CHUNK": 32 if shared == "power" else 128, "GROUPED": grouped,
        "HELD": held, "FUSED": fused, "SHARED": shared, "EXPONENT": exponent, "SPAN": 1024, "BIAS": fused,
        "BLOCK_M": rows, "BLOCK_N": outputs,
    }, warps)
    # What a product is added to: the sum of the loop, or nothing.
    joined = re.search(r"dot [^,]+, [^,]+, %arg", made.asm["ttgir"]) is not None
    print("multiply", arch, x, weight, shared, "joined" if joined else "apart", made.asm["ptx"].count("wgmma.mma"))


def quantize(arch, x, shared):
    names, held, pointer, exponent = rounding(x, arch)
    types = POINTERS | {"codes_ptr": pointer, "scales_ptr": "*u8" if shared == "power" else "*fp32"}
    if shared == "token":
        for pieces in (1, 2):
            make(quantizedevice.quantize_tokens, arch, types, names | {"PIECES": pieces, "BLOCK": 1024}, 4)
    else:
        more = {"SHARED": shared, "EXPONENT": exponent, "GROUPS": 32, "GROUP": 32}
        make(quantizedevice.quantize_pieces, arch, types, names | more, 4)
    print("quantize", arch, x, shared)


if sys.argv[1] == "some":
    product(90, E4M3, E4M3, "token", False)
    product(80, E4M3, E4M3, "group", True)
    quantize(90, E4M3, "power")
else:
    for arch in (80, 89, 90):
        for x, weight in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E4M3, "int4"), (INT8, INT8), (INT8, "int4")):
            product(arch, x, weight, "token", False)
        product(arch, E4M3, E4M3, "token", False, 64, 128)
        product(arch, E4M3, E4M3, "token", True)
        product(arch, INT8, INT8, "tensor", True)
        product(arch, E4M3, E4M3, "group", True)
        product(arch, E4M3, E2M1, "power", True)
        product(arch, E2M1, E2M1, "power", False)
        for x, shared in ((E4M3, "token"), (E4M3, "power"), (E5M2, "group"), (E2M1, "power"), (INT8, "tensor")):
            quantize(arch, x, shared)
"""


def test_the_kernels_are_compiled_and_short_sums_end_with_a_chunk(tmp_path):
    lines = compiled(PROGRAM, "some", tmp_path)
    assert lines[0] == "multiply 90 float8_e4m3fn float8_e4m3fn token apart 4"
    assert len(lines) == 3


@pytest.mark.slow
def test_every_form_is_compiled_for_three_generations(tmp_path):
    """Sums of FP8 begin anew with each chunk wherever FP8 is multiplied; what is lifted or whole may go on."""
    lines = [line.split() for line in compiled(PROGRAM, "every", tmp_path)]
    products = [line for line in lines if line[0] == "multiply"]
    assert (len(products), len(lines)) == (36, 51)
    for _, arch, x, _, _, sums, instructions in products:
        assert sums == "apart" or x == "int8" or arch == "80"
        assert (int(instructions) > 0) is (arch == "90")
