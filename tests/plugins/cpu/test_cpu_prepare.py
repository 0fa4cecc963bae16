"""Preparing for the CPU kernels: in place, back again, within memory, and never past what an operator can take."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_layers import Layer, problem, spec, weights, with_scales

from quantplug.kernel import LinearKernel
from quantplug.spec import LinearProblem, PerChannel, PerTensor
from quantplug.weight import Weight
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_testkit.compare import assert_bitwise_equal

CPU = torch.device("cpu")
NOTHING_STORED = (None, None)
FOUR, EIGHT = Int4Kernel(), Int8Kernel()

EXACT = [
    (FOUR, spec("int4", 32, scales="bfloat16"), (64, 7), 128, "bfloat16"),
    (FOUR, spec("uint3", 48, scales="bfloat16"), 33, 100, "bfloat16"),
    (FOUR, spec("uint2", PerTensor(), scales="bfloat16"), (5, 3), 40, "bfloat16"),
    (FOUR, spec("uint4", 32, act_order=True, scales="float16"), (48, 16), 96, "float16"),
    (FOUR, spec("int4", 16, scales="float32"), 64, 64, "float32"),
    (EIGHT, spec("int8", PerChannel(), scales="bfloat16"), (64, 7), 50, "bfloat16"),
    (EIGHT, spec("int8", PerTensor(), scales="float16"), (4, 3), 32, "float32"),
    (EIGHT, spec("uint8", 32, act_order=True, scales="bfloat16"), 48, 80, "bfloat16"),
    (EIGHT, spec("int8", 64, scales="float32"), 48, 128, "float16"),
    (EIGHT, spec("int8", 128, act_order=True, scales="bfloat16"), 16, 128, "bfloat16"),
]


def assert_same(found: tuple[Weight, ...], expected: tuple[Weight, ...]) -> None:
    assert [weight.spec for weight in found] == [weight.spec for weight in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("codes", "scales", "zeros", "g_idx"):
            tensors = getattr(one, name), getattr(other, name)
            assert (tensors[0] is None) == (tensors[1] is None), name
            if tensors[1] is not None:
                assert_bitwise_equal(*tensors, name)


@pytest.mark.parametrize(("kernel", "weight", "n", "k", "dtype"), EXACT)
def test_weights_whose_scales_are_kept_come_back_bit_by_bit(
    kernel: LinearKernel, weight, n, k: int, dtype: str
) -> None:
    layer = Layer.of(kernel, problem(weight, n, k, dtype))
    assert_same(kernel.unprepare(layer.prepared), layer.weights)


@pytest.mark.parametrize(
    ("kernel", "weight"), [(FOUR, spec("int4", 32)), (EIGHT, spec("uint8", 32)), (EIGHT, spec("int8", PerChannel()))]
)
def test_scales_come_back_from_bfloat16_only_where_it_holds_them(kernel: LinearKernel, weight) -> None:
    """The same layer may be filled again with scales that are not representable, and says so from then on."""
    asked = problem(weight, 64, 128)
    given = weights(asked)
    kept = tuple(with_scales(one, one.scales.to(torch.bfloat16).to(torch.float16)) for one in given)
    layer = Layer.of(kernel, asked, kept)
    assert_same(kernel.unprepare(layer.prepared), kept)
    again = kernel.prepare(asked, given, NOTHING_STORED, CPU, out=layer.prepared)
    with pytest.raises(NotImplementedError, match="holds the scales of this layer rounded to bfloat16"):
        kernel.unprepare(again)
    assert_same(kernel.unprepare(kernel.prepare(asked, kept, NOTHING_STORED, CPU, out=again)), kept)


def test_scales_in_another_dtype_than_planned_are_used_as_they_are_and_have_no_way_back() -> None:
    asked = problem(spec("int4", 32, scales="float16"), 64, 128, "float32")
    given = tuple(with_scales(one, one.scales.to(torch.float32) * 1e-9) for one in weights(asked))
    layer = Layer.of(FOUR, asked, tuple(replace(one, spec=asked.segments[0].weight) for one in given))
    for rows in (1, 64):
        layer.check(layer.inputs(rows))
    with pytest.raises(NotImplementedError):
        FOUR.unprepare(layer.prepared)


def test_bytes_that_lie_as_the_operator_wants_them_are_not_copied() -> None:
    (weight,) = weights(problem(spec("int8", PerChannel()), 64, 128))
    layer = Layer.of(EIGHT, problem(weight.spec, 64, 128), (weight,))
    assert layer.prepared.tensors["codes.0"].data_ptr() == weight.codes.data_ptr()


def test_weights_that_do_not_fit_in_place_leave_the_old_ones_as_they_were() -> None:
    """A layer whose inputs are in order cannot take one whose inputs move: it has no place for the permutation."""
    asked = problem(spec("uint4", 32, act_order=True), 64, 128)
    moved = weights(asked)
    layer = Layer.of(FOUR, asked, tuple(replace(weight, g_idx=None) for weight in weights(asked, seed=1)))
    x = layer.inputs(3)
    before = FOUR.apply(x, layer.prepared, None)
    with pytest.raises(ValueError, match="do not fit in place of the old ones"):
        FOUR.prepare(asked, moved, NOTHING_STORED, CPU, out=layer.prepared)
    assert torch.equal(FOUR.apply(x, layer.prepared, None), before)


def broken(weight: Weight) -> list[tuple[Weight, str]]:
    """Return weights that do not obey their contract, and what is said about them."""
    assert weight.zeros is not None
    ordered = replace(weight, spec=replace(weight.spec, act_order=True))
    return [
        (replace(weight, scales=weight.scales[:, :-1]), r"scales are \[64, 3\], not \[64, 4\]"),
        (replace(weight, scales=weight.scales[:-1]), r"scales are \[63, 4\], not \[64, 4\]"),
        (replace(weight, zeros=weight.zeros[:, :-1]), r"zero points are \[64, 3\], not \[64, 4\]"),
        (replace(weight, zeros=None), "zero points are missing for uint4"),
        (replace(weight, codes=weight.codes[:, :-1]), "codes have 127 inputs, not 128"),
        (replace(weight, codes=weight.codes.to(torch.int8)), "codes are torch.int8, not torch.uint8"),
        (replace(weight, g_idx=torch.zeros(128, dtype=torch.int32)), "g_idx is there for uint4 group 32"),
        (replace(ordered, g_idx=torch.zeros(127, dtype=torch.int32)), r"g_idx is \[127\], not \[128\]"),
        (replace(ordered, g_idx=torch.full((128,), 4, dtype=torch.int32)), "leaves the 4 groups that have scales"),
        (replace(ordered, g_idx=torch.full((128,), -1, dtype=torch.int32)), "leaves the 4 groups that have scales"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_weights_that_break_their_contract_are_refused_by_name_and_good_ones_follow(case: int) -> None:
    asked = problem(spec("uint4", 32), 64, 128)
    (good,) = weights(asked)
    bad, message = broken(good)[case]
    layer = Layer.of(FOUR, asked, (good,))
    before = {name: tensor.clone() for name, tensor in layer.prepared.tensors.items()}
    for out in (None, layer.prepared):
        with pytest.raises(ValueError, match=message):
            FOUR.prepare(asked, (bad,), NOTHING_STORED, CPU, out=out)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.prepared.tensors.items())
    layer.check(layer.inputs(2))


def test_segments_with_scales_of_different_dtypes_are_refused() -> None:
    asked = problem(spec("int8", PerChannel()), (16, 16), 32)
    first, second = weights(asked)
    with pytest.raises(ValueError, match=r"scales are torch\.float16 and torch\.float32"):
        EIGHT.prepare(asked, (first, replace(second, scales=second.scales.float())), NOTHING_STORED, CPU)


HOSTILE = """
import torch
from cpu_layers import Layer, problem, spec
from quantplug.spec import PerChannel, PerTensor
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
torch.set_num_threads(1)
four, eight = Int4Kernel(), Int8Kernel()
for k in (1, 3, 15, 17, 31, 33, 40, 63, 65, 100):
    for kernel, element, group in (
        (eight, "int8", PerChannel()), (eight, "uint8", PerTensor()), (four, "uint4", PerChannel())
    ):
        for n in (1, 5, 33):
            layer = Layer.of(kernel, problem(spec(element, group), n, k))
            for rows in (0, 1, 2, 5, 30, 60):
                x = layer.inputs(rows)
                for y in (x, x.unsqueeze(0), x.t().contiguous().t(), torch.cat([x, x], 1)[:, :k]):
                    kernel.apply(y, layer.prepared, None)
                layer.check(x)
print("alive")
"""


def test_shapes_that_crash_the_operators_never_reach_them() -> None:
    """Run in a process of its own: the int8 operator kills it where K is not a multiple of 16."""
    path = {"PYTHONPATH": str(Path(__file__).parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", HOSTILE], env=path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


PEAK = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from cpu_layers import problem, spec
from quantplug.spec import PerChannel
from quantplug.weight import Weight
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

kernel = {kernel}()
n, k = 4096, 8192
weight = spec("{element}", {group}, act_order={act_order})
codes = torch.zeros(k, n, dtype=torch.{dtype}).t()
if {n_major}:
    codes = codes.contiguous()
groups = 1 if "{group}" == "PerChannel()" else k // 64
zeros = torch.ones(n, groups, dtype=torch.uint8) if "{dtype}" == "uint8" else None
g_idx = (torch.arange(k).flip(0) // 64).to(torch.int32) if {act_order} else None
given = Weight(codes, torch.ones(n, groups, dtype=torch.float16), weight, zeros, g_idx)
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
prepared = kernel.prepare(problem(weight, n, k), (given,), (None,), torch.device("cpu"))
print(status("VmHWM") - before - prepared.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak")
@pytest.mark.parametrize(
    ("kernel", "element", "group", "act_order", "n_major"),
    [
        ("Int4Kernel", "int4", 64, False, False),
        ("Int4Kernel", "uint4", 64, True, False),
        ("Int4Kernel", "int4", 64, False, True),
        ("Int8Kernel", "uint8", 64, False, False),
        ("Int8Kernel", "int8", "PerChannel()", False, False),
    ],
)
def test_preparing_takes_little_more_memory_than_what_stays(
    kernel: str, element: str, group: object, act_order: bool, n_major: bool
) -> None:
    """Neither a copy of the codes (33 MB here) nor their int32 form (134 MB), which the operator's packing wants."""
    script = PEAK.format(
        kernel=kernel,
        element=element,
        group=group,
        act_order=act_order,
        n_major=n_major,
        dtype=f"{element.rstrip('48')}8",
    )
    path = {"PYTHONPATH": str(Path(__file__).parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25_000_000


def test_a_problem_is_kept_with_what_was_prepared() -> None:
    asked: LinearProblem = problem(spec("int4", 32), 64, 128)
    assert Layer.of(FOUR, asked).prepared.problem == asked
