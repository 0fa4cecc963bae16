"""
What Triton's interpreter cannot see: that its compiler takes the launches for experts, for a GPU that is not here.

A process of its own compiles, for the interpreter, once chosen, is there for good.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")

PROGRAM = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantplug_cublas import expertdevice

POINTERS = {
    "ids_ptr": "*i64", "map_ptr": "*i32", "local_ptr": "*i32", "places_ptr": "*i32", "counts_ptr": "*i32",
    "ends_ptr": "*i32", "x_ptr": "*bf16", "product_ptr": "*bf16", "outputs_ptr": "*bf16", "bias_ptr": "*bf16",
    "y_ptr": "*bf16", "weights_ptr": "*fp32", "known_ptr": "*fp32", "codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32",
    "limit": "fp32", "alpha": "fp32", "up_offset": "fp32",
}
CODES = {"TOP": 448.0, "LEAST": 2.0**-126, "BLOCK": 256}


def build(kernel, **constants):
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(made.asm["cubin"]))


def activate(name, *, more, pieces=1):
    build(
        expertdevice.activate, GATED=more, APART=more, BIAS=more, STATIC=more, NAME=name, LIMITED=more, PIECES=pieces,
        **CODES,
    )


build(expertdevice.rank, MAP=True, ALONE=True, TURNS=2, BINS=64, BLOCK=64)
build(expertdevice.locate, TURNS=1, BINS=256, BLOCK=256, ROWS=32)
build(expertdevice.quantize_choices, TOP_K=2, ON_INPUT=False, STATIC=False, TURNS=1, PIECES=1, **CODES)
activate("silu", more=True)
build(expertdevice.combine, TOP_K=2, BIAS=True, ON_INPUT=False, BLOCK=256)
if sys.argv[1] == "every":
    build(expertdevice.rank, MAP=False, ALONE=False, TURNS=1, BINS=256, BLOCK=256)
    build(expertdevice.quantize_choices, TOP_K=1, ON_INPUT=True, STATIC=True, TURNS=2, PIECES=2, **CODES)
    for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        activate(name, more=False, pieces=2)
    activate("gelu", more=True, pieces=3)
"""


def compiled(tmp_path, which: str) -> list[str]:
    """Return a line for each launch that was compiled."""
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Sums are fused with products where Triton does so by itself; it warns that this will change.
    surroundings |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), which], env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_each_launch_is_compiled_for_compute_capability_9(tmp_path):
    found = {line.split()[0] for line in compiled(tmp_path, "some")}
    assert found == {"rank", "locate", "quantize_choices", "activate", "combine"}


@pytest.mark.slow
def test_every_form_of_them_is(tmp_path):
    assert len(compiled(tmp_path, "every")) == 13
