"""The dense product that the core derives from every kernel that dequantizes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_checkpoints import toy_registry

from quantplug.dense import DenseProduct
from quantplug.hooks import hookimpl
from quantplug.inventory import ModuleInfo
from quantplug.kernel import Accepted, Cast, Cost, LinearKernel, Rejected, Traits, Verdict
from quantplug.plan import Choice
from quantplug.platform import Platform
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.reference import ReferenceKernel
from quantplug.select import select
from quantplug.spec import ActivationSpec, ElementType, LinearProblem, PerChannel, PerGroup, SegmentSpec, WeightSpec
from quantplug_testkit import toys
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_testkit.quantizing import QuantizingKernel

CPU, H100 = Platform.parse("cpu"), Platform.parse("cuda:9.0")
MODULE = ModuleInfo("model.layers.0.mlp.up_proj", "linear")
INT4 = WeightSpec(ElementType.INT4, PerGroup(64))


def problem(n: int = 4096, k: int = 4096, spec: WeightSpec = INT4, dtype: str = "bfloat16") -> LinearProblem:
    return LinearProblem(k, (SegmentSpec(n, spec),), dtype)


class Packed(toys.ToyKernel):
    """A kernel that claims what the test says."""

    name = "a.packed"
    layout_id = "packed"

    def __init__(self, **claims: object) -> None:
        self.claims = claims

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        return replace(Accepted(Cost(5.0, 100.0)), **self.claims)


class Honest(ReferenceKernel):
    """The reference kernel as a plugin's: what it claims of memory is right. One type of weight shows what counts."""

    name = "a.honest"
    layout_id = "honest"
    traits = Traits()

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        for segment in problem.segments:
            if segment.weight.element is not ElementType.UINT4:
                return Rejected("element", str(segment.weight.element))
            if {segment.weight.scale_dtype, problem.dtype} == {"float16", "bfloat16"}:
                return Rejected("dtype", f"scales in {segment.weight.scale_dtype}: inductor warns of the mixture")
        return super().supports(problem, platform)


class TestDenseProduct(LinearKernelConformance):
    kernel = DenseProduct(Honest())


def test_it_is_derived_from_kernels_of_plugins_that_dequantize_and_from_no_fallback() -> None:
    class Blind(toys.ToyKernel):
        name = "a.blind"
        dequantize = LinearKernel.dequantize

    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [Blind(), Packed()]

    vendor = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)
    registry = build_registry({"vendor": vendor})
    assert list(registry.kernels) == ["a.blind", "a.packed", "a.packed.dense", "reference"]
    assert registry.kernel("a.packed.dense").plugin == "vendor"
    assert list(registry.moe_kernels) == ["loop.a.blind", "loop.a.packed", "loop.reference"]


def test_a_plugins_own_kernel_of_that_name_stands() -> None:
    class Own(Packed):
        name = "a.packed.dense"

    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [Own(), Packed()]

    registry = build_registry({"vendor": SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)})
    assert type(registry.kernel("a.packed.dense").item) is Own
    assert isinstance(registry.kernel("a.packed.dense.dense").item, DenseProduct)


def test_it_takes_over_where_rows_pay_for_dequantizing() -> None:
    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [Packed(dequantize_us=2000.0)]

    registry = build_registry({"vendor": SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)})
    decision = select(problem(), MODULE, CPU, registry, Policy(), {})
    # 5 + 100 M against 12 + 2000 + 3355 + 86 M: the lines cross at M = 384.
    assert decision.choices == (Choice("a.packed", "packed", 0, 511), Choice("a.packed.dense", "packed", 512, None))
    assert decision.layouts == ("packed",)


def test_its_price_is_what_the_kernel_claims_or_that_of_ordinary_operators() -> None:
    def cost(platform: Platform, **claims: object) -> Cost:
        verdict = DenseProduct(Packed(**claims)).supports(problem(), platform)
        assert isinstance(verdict, Accepted)
        return verdict.cost

    weights = 4096 * 4096
    assert cost(H100, dequantize_us=50.0) == Cost(8.0 + 50.0 + 2 * weights / 3.0e6, weights / 3.3e8)
    unclaimed = cost(H100)
    assert unclaimed.fixed_us == pytest.approx(8.0 + 60.0 + 42 * weights / 3.0e6)
    assert unclaimed.row_us == weights / 3.3e8
    assert cost(CPU).at(1) > cost(H100).at(1)
    assert cost(Platform.parse("npu:910b")).at(1) > cost(H100).at(1)


def test_what_is_held_rounded_stays_declared_and_the_weights_rounding_joins() -> None:
    held = (
        Cast("scales", "bfloat16"),
        Cast("zeros", "bfloat16"),
        Cast("weights", "float16"),
        Cast("partials", "float16"),
    )
    kernel = DenseProduct(Packed(casts=held))
    on_cpu, on_gpu = kernel.supports(problem(), CPU), kernel.supports(problem(), H100)
    assert isinstance(on_cpu, Accepted)
    assert isinstance(on_gpu, Accepted)
    assert on_cpu.casts == (*held[:2], Cast("weights", "bfloat16"))
    assert on_gpu.casts == (*on_cpu.casts, Cast("partials", "bfloat16"))
    exact = kernel.supports(problem(dtype="float32"), H100)
    assert isinstance(exact, Accepted)
    assert exact.casts == held[:2]


def test_it_refuses_what_it_cannot_better_and_what_the_kernel_refuses() -> None:
    dense = Packed(extra_bytes=2 * 4096 * 4096)
    refusal = DenseProduct(dense).supports(problem(), CPU)
    assert refusal == Rejected("shape", "a.packed holds 4096 x 4096 in 42467328 bytes, a dense layer in 33554432")
    assert DenseProduct(Packed()).supports(problem(dtype="float64"), CPU) == Rejected(
        "dtype", "activation dtype float64", "use one of bfloat16, float16, float32"
    )
    toy = DenseProduct(toys.ToyKernel())
    assert toy.supports(problem(k=40), CPU) == toys.ToyKernel().supports(problem(k=40), CPU)
    int8 = WeightSpec(ElementType.INT8, PerChannel(), "float32")
    asked = LinearProblem(
        64, (SegmentSpec(64, int8),), "bfloat16", activation=ActivationSpec(ElementType.INT8, "token", dynamic=True)
    )
    refusal = DenseProduct(QuantizingKernel()).supports(asked, CPU)
    assert isinstance(refusal, Rejected)
    assert refusal.reason.endswith("takes x as int8 per token, dynamic, a dense product as it is")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_the_way_back_are_the_kernels(dtype: torch.dtype) -> None:
    kernel = toy_registry().kernel("toy.fast").item
    dense = toy_registry().kernel("toy.fast.dense").item
    weight = toys.ToyScheme.build({}, "test").quantize(torch.randn(48, 32))
    asked = LinearProblem(32, (SegmentSpec(48, weight.spec),), str(dtype).removeprefix("torch."))
    prepared = dense.prepare(asked, [weight], [None], torch.device("cpu"))
    assert prepared.layout_id == kernel.layout_id
    assert torch.equal(dense.dequantize(prepared, dtype), weight.dequantize(dtype))
    assert torch.equal(dense.unprepare(prepared)[0].codes, weight.codes)
    x = torch.randn(2, 3, 32, dtype=dtype, requires_grad=True)
    y = dense.apply(x, prepared, None)
    assert torch.equal(y.detach(), torch.nn.functional.linear(x.detach(), weight.dequantize(dtype)))
    y.sum().backward()
    assert x.grad is not None
