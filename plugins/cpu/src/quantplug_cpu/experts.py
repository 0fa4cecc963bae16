"""
The kernels for mixtures of experts: the linear kernels of this plugin, on stacks of experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from quantplug.kernel import Accepted, Cast, Cost, LinearKernel, Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug_cpu.dense import DenseKernel
from quantplug_cpu.float4 import Float4Kernel
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_cpu.w8a8 import W8A8Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform
    from quantplug.spec import ActivationSpec, LinearProblem

# What a call takes beside the products, and an expert beside its two: measured with products of next to no size.
_CALL_US = 50.0
_EXPERT_US = 5.0


class StackedKernel(MoEKernel):
    """
    Experts in the layout of a linear kernel, one behind the other, and run by its products.

    Gate and up are one product. What does not depend on the expert is done once for all rows, and experts without rows
    are not looked at. Sums over experts are in float32.
    """

    __slots__ = ()

    traits = Traits(differentiable=True)
    linear: ClassVar[LinearKernel]
    """Packs and multiplies one expert's weights."""

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept what the linear kernel accepts for both products, gate and up in one contract and inputs in order."""
        refusal = self._refuse(problem, platform)
        if refusal is not None:
            return refusal
        verdicts: list[Accepted] = []
        for where, part in zip(("gate and up", "down"), _products(problem), strict=True):
            verdict = self.linear.supports(part, platform)
            if isinstance(verdict, Rejected):
                # Where it names a linear kernel, the one for experts that rests on that is meant.
                return Rejected(verdict.code, f"{where}: {verdict.reason}", verdict.fix.replace("cpu.", "cpu.moe."))
            verdicts.append(verdict)
        one, two = verdicts
        casts = (*one.casts, *two.casts, Cast("gate_up", problem.dtype), Cast("expert", problem.dtype))
        return Accepted(
            _cost(problem, one.cost.plus(two.cost)),
            casts=tuple(dict.fromkeys(casts)),
            extra_bytes=problem.experts * (one.extra_bytes + two.extra_bytes),
            notes=tuple(dict.fromkeys((*one.notes, *two.notes))),
            quantizes_x=one.quantizes_x,
        )

    def probe(self, platform: Platform) -> Rejected | None:
        """Refuse where the linear kernel does."""
        return self.linear.probe(platform)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Prepare one expert after the other, each in its place."""
        from quantplug_cpu.onecall import numbered
        from quantplug_cpu.stacked import prepare

        made = prepare(problem, _products(problem), experts, self.linear, self.layout_id, out)
        return numbered(made, self.linear.name) if out is None else made

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts that have rows."""
        import torch

        if torch.compiler.is_compiling() and not (x.requires_grad or topk_weights.requires_grad):
            from quantplug_cpu.onecall import call

            return call(x, topk_weights, topk_ids, prepared, expert_map)
        from quantplug_cpu.routed import run

        return run(x, topk_weights, topk_ids, prepared, expert_map, self.linear.name)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's values as the linear kernel does."""
        from quantplug_cpu.stacked import dequantize

        return dequantize(prepared, expert, self.linear)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights where the linear kernel can."""
        from quantplug_cpu.stacked import unprepare

        return unprepare(prepared, expert, self.linear)

    def _refuse(self, problem: MoEProblem, platform: Platform) -> Rejected | None:
        """Return why the experts cannot be stacked, or None."""
        if platform.kind != "cpu":
            return Rejected("platform", f"runs on cpu, not on {platform}")
        for name, size in (("experts", problem.experts), ("top_k", problem.top_k)):
            if size < 1:
                return Rejected("shape", f"{name} is {size}", "at least 1")
        if problem.router_weight_on_input and problem.top_k != 1:
            return Rejected("shape", f"top_k {problem.top_k} with the router's weight on the input", "top_k 1")
        if not self.linear.traits.uniform_segments:
            return None
        if not problem.first.uniform:
            kinds = " and ".join(spec.describe() for spec in problem.w13)
            return Rejected("segments", f"gate and up differ: {kinds}", f"loop.{self.linear.name} takes them apart")
        for spec in (*problem.w13, problem.w2):
            if spec.act_order:
                return Rejected(
                    "act_order",
                    f"every expert has an order of its own: {spec.describe()}",
                    f"loop.{self.linear.name} takes it",
                )
        return None


class Int4Experts(StackedKernel):
    """Experts of 2-, 3- and 4-bit integers, see `Int4Kernel`."""

    __slots__ = ()

    name = "cpu.moe.int4"
    layout_id = "cpu.moe.int4"
    linear = Int4Kernel()


class Int8Experts(StackedKernel):
    """Experts of 8-bit integers, see `Int8Kernel`."""

    __slots__ = ()

    name = "cpu.moe.int8"
    layout_id = "cpu.moe.int8"
    linear = Int8Kernel()


class Float4Experts(StackedKernel):
    """Experts of float4_e2m1fn in groups of 32 inputs and more, see `Float4Kernel`."""

    __slots__ = ()

    name = "cpu.moe.float4"
    layout_id = "cpu.moe.float4"
    linear = Float4Kernel()


class W8A8Experts(StackedKernel):
    """Experts of signed 8-bit integers, both inputs quantized to 8 bits per token, see `W8A8Kernel`."""

    __slots__ = ()

    name = "cpu.moe.w8a8"
    layout_id = Int8Experts.layout_id
    linear = W8A8Kernel()

    def _refuse(self, problem: MoEProblem, platform: Platform) -> Rejected | None:
        """Refuse scales of x that are stored for each expert, or shared by rows: what rows would be left to read."""
        refusal = super()._refuse(problem, platform)
        if refusal is None and problem.activation is not None and not _per_token(problem.activation):
            return Rejected(
                "activation", f"x as {problem.activation.describe()}", "int8 per token, dynamic; loop.cpu.w8a8 takes it"
            )
        return refusal


class DenseExperts(StackedKernel):
    """Experts of every format, dequantized once, see `DenseKernel`."""

    __slots__ = ()

    name = "cpu.moe.dense"
    layout_id = "cpu.moe.dense"
    linear = DenseKernel()


def _cost(problem: MoEProblem, expert: Cost) -> Cost:
    """
    Return the cost of a call, from that of both products of one expert.

    Few rows choose an expert each; of many, every expert has its share.
    """
    row = problem.top_k * (_EXPERT_US + expert.fixed_us + expert.row_us)
    return Cost(_CALL_US, row, _every_expert(problem, expert))


def _every_expert(problem: MoEProblem, expert: Cost) -> Cost:
    many = None if expert.many is None else _every_expert(problem, expert.many)
    fixed = _CALL_US + problem.experts * (_EXPERT_US + expert.fixed_us)
    return Cost(fixed, problem.top_k * expert.row_us, many)


def _per_token(activation: ActivationSpec) -> bool:
    return activation.dynamic and activation.granularity == "token"


def _products(problem: MoEProblem) -> tuple[LinearProblem, LinearProblem]:
    """
    Return both products of an expert as the linear kernel is to see them.

    What a file stores about x is each expert's own and not looked at; the permission to compute scales is passed on.
    """
    first, second = problem.first, problem.second
    if problem.activation is not None and not _per_token(problem.activation):
        return replace(first, activation=None), replace(second, activation=None)
    return first, second
