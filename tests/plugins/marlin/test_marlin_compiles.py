"""NVIDIA's compiler takes the sources for each architecture, without a GPU; and cuts fit into its memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from quantplug.spec import ElementType
from quantplug_marlin.choice import choose, every_choice
from quantplug_marlin.compiler import CompileError, compiler
from quantplug_marlin.cut import Cut, GroupCut
from quantplug_marlin.device import Target, options_for
from quantplug_marlin.form import Form
from quantplug_marlin.source import source_of

pytest.importorskip("cuda.bindings", reason="cuda-bindings is installed on Linux only")

INT4 = Form(ElementType.INT4, half=False, scale="float16", parts=1, per_group=2)
FEW, MANY = Cut(2, 8, 1, 16, 4), Cut(2, 64, 4, 2, 4)
GROUP = GroupCut(2, 64, 2, 1, 4, shares=4)
MOST = GroupCut(2, 32, 2, 2, 4)
EXPERTS = tuple(
    {"EXPERTS": number, "GATED": gated, "FUNCTION": function, "LIMITED": gated}
    for number, gated, function in ((1, 1, 0), (1, 0, 4), (2, 0, 0))
)
"""The first product with gate and up, and without a gate; the second."""


class Machine(NamedTuple):
    name: str
    target: Target


MACHINES = (
    Machine("A100", Target((8, 0), 108, 163 << 10)),
    Machine("A10", Target((8, 6), 72, 99 << 10)),
    Machine("H100", Target((9, 0), 132, 227 << 10)),
    Machine("B200", Target((10, 0), 148, 227 << 10)),
    Machine("5090", Target((12, 0), 170, 99 << 10)),
)


def code(file: str, definitions: dict[str, int], architecture: str) -> bytes:
    return compiler().compile(source_of(file, definitions), options_for(architecture))


@pytest.mark.parametrize(("cut", "architecture"), [(FEW, "sm_80"), (GROUP, "sm_90a")], ids=["few rows", "warpgroups"])
def test_the_product_compiles(cut, architecture):
    assert code(cut.file, {**INT4.definitions(), **cut.definitions()}, architecture)[:4] == b"\x7fELF"


@pytest.mark.parametrize(("cut", "architecture"), [(FEW, "sm_80"), (MOST, "sm_90a")], ids=["few rows", "warpgroups"])
@pytest.mark.parametrize("own", EXPERTS, ids=["gate and up", "no gate", "down"])
def test_the_products_of_experts_compile(own, cut, architecture):
    assert code(cut.file, {**INT4.definitions(), **cut.definitions(), **own}, architecture)[:4] == b"\x7fELF"


@pytest.mark.parametrize("file", ["gather.cu", "shares.cu", "dense.cu", "route.cu", "rows.cu", "combine.cu"])
def test_what_surrounds_the_product_compiles(file):
    assert code(file, {**INT4.definitions(), "OUT": 2}, "sm_80")[:4] == b"\x7fELF"


def test_a_refused_source_shows_the_compilers_words():
    with pytest.raises(CompileError, match="nonsense"):
        compiler().compile("nonsense", options_for("sm_80"))


@pytest.mark.slow
@pytest.mark.parametrize("function", range(5))
def test_every_function_compiles(function):
    for own in EXPERTS:
        assert code("multiply.cu", {**INT4.definitions(), **FEW.definitions(), **own, "FUNCTION": function}, "sm_90a")


NEWER = (ElementType.INT4, ElementType.UINT8, ElementType.FLOAT8_E4M3FN, ElementType.FLOAT4_E2M1FN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("element", "architecture"),
    [
        *((element, name) for name in ("sm_80", "sm_90a") for element in ElementType),
        *((element, name) for name in ("sm_100", "sm_120") for element in NEWER),
    ],
)
def test_every_form_compiles(element, architecture):
    for half in (False, True):
        for scale, parts, per_group in (("", 0, 1), ("float16", 1, 2), ("bfloat16", 2, 1), ("float32", 4, 3)):
            form = Form(element, half, scale, parts, per_group)
            for cut in (FEW, MANY, *([GROUP] if architecture == "sm_90a" else [])):
                assert code(cut.file, {**form.definitions(), **cut.definitions()}, architecture)
            assert code("dense.cu", {**form.definitions(), "OUT": int(half)}, architecture)
            for own in EXPERTS:
                assert code("multiply.cu", {**form.definitions(), **FEW.definitions(), **own}, architecture)
            if architecture == "sm_90a":
                assert code(MOST.file, {**form.definitions(), **MOST.definitions(), **EXPERTS[0]}, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("element", [element for element in ElementType if element.floating])
def test_scales_that_multiply_codes_compile(element, half):
    for scale, parts in (("bfloat16", 2), ("float16", 4)):
        form = Form(element, half, scale, parts, 1, exact=True)
        for cut in (GROUP, GroupCut(2, 256, 1, 2, 4)):
            assert code(cut.file, {**form.definitions(), **cut.definitions()}, "sm_90a")


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_every_choice_fits_into_shared_memory_and_covers_the_product(machine):
    forms = (
        INT4,
        Form(ElementType.FLOAT8_E4M3FN, half=False, scale="bfloat16", parts=2, per_group=1),
        Form(ElementType.UINT8, half=True, scale="float32", parts=4, per_group=1),
        Form(ElementType.INT8, half=False, scale="", parts=0, per_group=1),
    )
    for form in forms:
        for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (576, 576), (16, 64), (151936, 2048)):
            for rows in (1, 16, 32, 64, 128, 8192):
                cut = choose(form, n // 16, k // 64, rows, machine.target)
                across, down, splits = cut.grid(n // 16, rows)
                group = isinstance(cut, GroupCut)
                wide = 4 * cut.groups if group else cut.tiles * cut.warps_n
                about = f"{machine.name} {form} {n}x{k} {rows} rows: {cut}"
                fixed = cut.fixed_bytes if group else 0
                assert cut.shared_bytes(form) + fixed <= machine.target.shared_bytes, about
                assert cut.threads <= 1024, about
                if group:  # a block takes one piece after the other
                    pieces = -(-n // 16 // wide) * -(-rows // cut.tokens)
                    assert across == (pieces * cut.shares if cut.shares > 1 else min(pieces, 132)), about
                else:
                    assert across // cut.shares * wide * 16 >= n, about
                    assert down * cut.tokens >= rows, about
                assert 1 <= splits * cut.shares <= max(1, k // 64), about
                assert not group or (machine.name == "H100" and k // 64 % cut.chunks == 0), about
                assert not group or cut.stages == 1 or k // 64 % (cut.chunks * 2 * cut.shares) == 0, about


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_all_rows_get_a_kernel_that_was_built_ahead(machine):
    """A call that compiled could not be captured in a graph."""
    for n, k in ((4096, 4096), (28672, 4096), (576, 576)):
        built = [cut.definitions().items() for cut in every_choice(INT4, n // 16, k // 64, machine.target)]
        for rows in (1, 2, 8, 9, 16, 17, 31, 33, 65, 100, 129, 200, 512, 1000, 8192, 9000, 65536):
            assert choose(INT4, n // 16, k // 64, rows, machine.target).definitions().items() in built, rows
