"""Measuring kernels: what is right is timed and kept, what is wrong is found, reported and never chosen."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_checkpoints import toy_checkpoint

from quantplug.errors import PlanError
from quantplug.hooks import hookimpl
from quantplug.kernel import Accepted, Cast, Cost
from quantplug.planner import plan
from quantplug.platform import Platform
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.reference import ReferenceKernel
from quantplug.samples import sample_weights, sample_x
from quantplug.spec import (
    ActivationSpec,
    ElementType,
    LinearProblem,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    SegmentSpec,
    WeightSpec,
)
from quantplug.timingstore import read_timings
from quantplug.trial import Trial, Workload
from quantplug.tuning import tune
from quantplug_testkit import toys
from quantplug_testkit.bounds import ACCUMULATOR, CASTS
from quantplug_testkit.quantizing import QuantizingKernel

CPU = Platform.parse("cpu")
DEVICE = torch.device("cpu")
E = ElementType
SPECS = (
    WeightSpec(E.UINT4, PerGroup(32), act_order=True),
    WeightSpec(E.INT8, PerChannel(), "float32"),
    WeightSpec(E.FLOAT8_E4M3FN, PerBlock(16, 32), "bfloat16"),
    WeightSpec(E.FLOAT8_E5M2, PerTensor(), "float32"),
    WeightSpec(E.FLOAT4_E2M1FN, PerGroup(16), "float8_e4m3fn", global_scale=True),
    WeightSpec(E.FLOAT4_E2M1FN, PerGroup(32), "float8_e8m0fnu"),
)
UINT4 = SPECS[0]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(spec=UINT4, n=48, k=64, **other):
    return LinearProblem(k, (SegmentSpec(n, spec),), **{"dtype": "bfloat16", "bias": True, **other})


def try_kernel(kernel, asked, casts=(), rows=(1, 3, 20)):
    return Workload(asked, DEVICE, rows, 0.001).run(kernel, Accepted(Cost(1, 1), casts))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_right_kernel_is_timed_for_each_number_of_rows(spec, dtype):
    trial = try_kernel(ReferenceKernel(), problem(spec, dtype=dtype))
    assert trial.wrong == ""
    assert [rows for rows, _ in trial.us] == [1, 3, 20]
    assert all(us > 0 for _, us in trial.us)
    assert trial.nbytes >= 48 * 64


def test_segments_of_their_own_are_run_one_by_one_for_a_kernel_that_needs_that():
    class Uniform(toys.ToyKernel):
        def prepare(self, problem, segments, activation, device, out=None):
            assert len(segments) == 1
            return super().prepare(problem, segments, activation, device, out)

    mixed = LinearProblem(64, (SegmentSpec(48, SPECS[1]), SegmentSpec(16, UINT4)), "bfloat16", bias=True)
    assert try_kernel(Uniform(), mixed).wrong == ""


ACTIVATIONS = (
    ActivationSpec(E.INT8, "token", dynamic=True),
    ActivationSpec(E.INT8, "tensor", dynamic=False),
    ActivationSpec(E.UINT8, "tensor", dynamic=False),
    ActivationSpec(E.FLOAT8_E4M3FN, "token", dynamic=True),
    ActivationSpec(E.FLOAT8_E4M3FN, "tensor", dynamic=True),
    ActivationSpec(E.FLOAT8_E4M3FN, "group", dynamic=True, group_size=32, scale_dtype="float8_e8m0fnu"),
    ActivationSpec(E.FLOAT4_E2M1FN, "group", True, 16, "float8_e4m3fn", global_scale=True),
)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda spec: spec.describe())
def test_x_is_kept_exactly_by_every_permitted_way_to_quantize_it(activation):
    """So the kernel that quantizes x, which rests on the testkit's oracle, is as right as one that does not."""
    asked = problem(SPECS[1], activation=activation)
    verdict = QuantizingKernel().supports(asked, CPU)
    assert isinstance(verdict, Accepted)
    assert verdict.quantizes_x
    assert Workload(asked, DEVICE, (1, 20), 0.001).run(QuantizingKernel(), verdict).wrong == ""


class Broken(ReferenceKernel):
    name = "a.broken"

    def __init__(self, break_y=None, **weights):
        self.break_y, self.weights = break_y, weights

    def unprepare(self, prepared):
        return tuple(
            replace(weight, **{name: change(getattr(weight, name)) for name, change in self.weights.items()})
            for weight in super().unprepare(prepared)
        )

    def apply(self, x, prepared, bias):
        y = super().apply(x, prepared, bias)
        return y if self.break_y is None else self.break_y(y, x, bias)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Broken(zeros=lambda zeros: zeros ^ 1), "y[0, "),
        (Broken(codes=lambda codes: codes.roll(1, 0)), "y[0, "),
        (Broken(codes=lambda codes: codes.flip(1)), "y[0, "),
        (Broken(scales=lambda scales: scales.roll(1, 1)), "y[0, "),
        (Broken(g_idx=lambda g_idx: g_idx.sort().values), "y[0, "),
        (Broken(lambda y, x, bias: y - bias), "y[0, "),
        (Broken(lambda y, x, bias: y.roll(1, 0)), "with 3 rows, y[0, "),
        (Broken(lambda y, x, bias: torch.cat([y[:-1], y[-1:] * 0]) if len(y) > 16 else y), "with 20 rows, y[19, "),
        (Broken(lambda y, x, bias: y.index_fill(1, torch.tensor([47]), torch.nan)), "y[0, 47] is nan"),
        (Broken(lambda y, x, bias: y[:, :-1]), "y is [1, 47] in torch.bfloat16"),
        (Broken(lambda y, x, bias: y.float()), "y is [1, 48] in torch.float32"),
        (Broken(lambda y, x, bias: y.missing), "raised AttributeError: 'Tensor' object has no attribute 'missing'"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_found_and_not_timed(broken, says):
    trial = try_kernel(broken, problem())
    assert says in trial.wrong
    assert trial.us == ()


def test_a_declared_rounding_is_allowed_and_an_undeclared_one_is_not():
    class Rounding(ReferenceKernel):
        def dequantize(self, prepared, dtype):
            return super().dequantize(prepared, torch.bfloat16).to(dtype)

    asked = problem(dtype="float32")
    assert try_kernel(Rounding(), asked, (Cast("weights", "bfloat16"),)).wrong == ""
    assert "y[0, " in try_kernel(Rounding(), asked).wrong


def test_a_sum_in_parts_of_a_short_dtype_is_allowed_where_it_is_declared():
    class InParts(ReferenceKernel):
        def apply(self, x, prepared, bias):
            values = self.dequantize(prepared, torch.float32)
            y = 0 if bias is None else bias
            for piece, part in zip(x.float().split(64, 1), values.split(64, 1), strict=True):
                y = (y + (piece @ part.t()).bfloat16()).bfloat16()
            return y.to(x.dtype)

    asked = problem(k=512, dtype="float32")
    assert try_kernel(InParts(), asked, (Cast("splits", "bfloat16"),)).wrong == ""
    assert "y[0, " in try_kernel(InParts(), asked).wrong


@pytest.mark.parametrize("what", CASTS)
def test_every_cast_widens_the_bound(what):
    """Whatever the testkit knows a cast to be: what is not allowed for here would be called wrong."""
    work = Workload(problem(dtype="float32"), DEVICE, (1,), 0.001)
    casts = (Cast(what, ACCUMULATOR if what.endswith("accumulator") else "bfloat16"),)
    for each in ((), casts):
        work._exact.compare(torch.zeros(1, 48), each)
    plain, other = work._exact._found[()][1], work._exact._found[casts][1]
    assert bool((other > plain).all())


def test_what_does_not_fit_into_memory_is_not_called_wrong():
    def too_much(y, x, bias):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert try_kernel(Broken(too_much), problem()) == Trial()


def test_made_up_operands_are_the_same_every_time_and_obey_their_contract():
    asked = problem(SPECS[0])
    first, again = (sample_weights(asked, torch.Generator().manual_seed(0))[0] for _ in range(2))
    assert torch.equal(first.codes, again.codes)
    assert int(first.codes.max()) <= 15
    assert first.g_idx is not None
    assert first.g_idx.unique().tolist() == [0, 1]
    x = sample_x(asked, 4, torch.Generator().manual_seed(0))
    assert (x.shape, x.dtype) == ((4, 64), torch.bfloat16)


# -- tune


class Slow(toys.ToyKernel):
    """Claims to be the fastest, and is not."""

    name = "a.boaster"
    layout_id = "boaster"

    def supports(self, problem, platform):
        verdict = super().supports(problem, platform)
        return replace(verdict, cost=Cost(0.001, 0.0)) if isinstance(verdict, Accepted) else verdict

    def apply(self, x, prepared, bias):
        for _ in range(20):
            y = super().apply(x, prepared, bias)
        return y


class Wrong(Slow):
    name = "a.wrong"
    layout_id = "wrong"

    def apply(self, x, prepared, bias):
        return super().apply(x, prepared, bias) + 1


@hookimpl
def quantplug_kernels():
    return [Slow(), Wrong()]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    file = tmp_path / "timings.json"
    monkeypatch.setenv("QUANTPLUG_TIMINGS", str(file))
    vendor = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)
    registry = build_registry({"toys": toys, "vendor": vendor})
    directory = toy_checkpoint(tmp_path / "model")

    def run(**given):
        return tune(directory, rows=[1, 8], seconds=0.001, registry=registry, **given)

    return SimpleNamespace(run=run, file=file, registry=registry, directory=directory)


def test_tune_measures_keeps_and_changes_the_choice(tuned):
    told = []
    report = tuned.run(progress=lambda what, done, total: told.append((what, done, total)))
    assert {item.problem.out_features for item in report.problems} == {16, 32, 48}
    assert sum(item.layers for item in report.problems) == 8
    for item in report.problems:
        assert item.before.kernel.startswith("a.")
        assert (item.before.basis, item.after.basis) == ("estimated", "measured")
        assert item.after.kernel not in ("a.boaster", "a.wrong")
        by_kernel = {m.kernel: m for m in item.measurements}
        assert "reference" not in by_kernel
        assert "y[0, 0]" in by_kernel["a.wrong"].wrong
        assert [rows for rows, _ in by_kernel["a.boaster"].us] == [1, 8]
    assert told[0][1:] == (0, len(report.problems))
    assert told[-1] == ("", len(report.problems), len(report.problems))
    assert len(read_timings(tuned.file)) == sum(len(item.measurements) for item in report.problems)
    made = plan(tuned.directory, registry=tuned.registry)
    assert {decision.basis for decision in made.decisions} == {"measured"}
    assert not any("not measured" in text for text in made.warnings)


def test_tune_measures_nothing_that_a_policy_denies(tuned):
    report = tuned.run(policy=Policy.parse({"rule": [{"deny": "a.*"}]}, "test"))
    names = {m.kernel for item in report.problems for m in item.measurements}
    assert names == {"toy.fast", "toy.many", "toy.fast.dense", "toy.many.dense"}


def test_tune_says_that_it_replaced_a_broken_file(tuned):
    tuned.file.write_text("{")
    report = tuned.run()
    [warning] = report.warnings
    assert "the measured times are ignored" in warning


def test_tune_with_nowhere_to_keep_times_is_an_error(tuned, monkeypatch):
    monkeypatch.setenv("QUANTPLUG_TIMINGS", "off")
    with pytest.raises(PlanError, match="QUANTPLUG_TIMINGS=off keeps no measured times") as raised:
        tuned.run()
    assert raised.value.code == "QP-PLAN-TIMINGS"


def test_a_device_that_a_kernel_left_unusable_is_nobody_elses_fault(tuned, monkeypatch):
    def touch(self):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Workload, "touch", touch)
    with pytest.raises(PlanError, match=r"left the device unusable .*illegal memory access") as raised:
        tuned.run()
    assert raised.value.code == "QP-PLAN-TIMINGS"
