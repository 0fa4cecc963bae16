"""
Kernels for experts that are slow, plain and right: every expert sees every row, and a row keeps what it asked for.

They are what the zoo breaks, and a reading of `oracles.experts` in torch. They share nothing with that oracle, nor with
the core's loop over experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.expertweights import ExpertWeights, PreparedExperts
from quantplug.kernel import Accepted, Cost, Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel
from quantplug.spec import ElementType
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.canonical import weight_tensors
from quantplug_testkit.quantizing import fake_quantize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.moe import ExpertFunction, MoEProblem
    from quantplug.platform import Platform
    from quantplug.spec import WeightSpec

_DTYPES = ("bfloat16", "float16", "float32")
_OF_WEIGHTS = ("codes", "scales", "zeros", "g_idx", "global_scale")
_OF_ACTIVATIONS = ("scale", "zero", "global_scale")


class PlainExperts(MoEKernel):
    """Everything in float32 but h, which is rounded to the problem's dtype; x stays as it is."""

    name = "testkit.experts"
    layout_id = "testkit.experts"
    traits = Traits(graph_safe=True, differentiable=True, tangents=True)

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept every problem in a float dtype; weights stay one byte per code."""
        if problem.dtype not in _DTYPES:
            return Rejected("dtype", f"activation dtype {problem.dtype}", f"use one of {', '.join(_DTYPES)}")
        if problem.router_weight_on_input and problem.top_k != 1:
            return Rejected("shape", f"top_k {problem.top_k} with the router's weight on the input", "top_k 1")
        parts = [problem.w2, *problem.w13]
        spare_bits = problem.intermediate * problem.hidden * sum(8 - spec.element.bits for spec in parts)
        weights = problem.experts * problem.intermediate * problem.hidden
        return Accepted(Cost(100 + weights * 0.01, weights * 0.001), extra_bytes=problem.experts * spare_bits // 8 + 1)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Keep copies of the canonical tensors, each expert's under its number."""
        kept: dict[str, torch.Tensor] = {}
        for number, expert in enumerate(experts):
            for name, tensor in expert_tensors(expert).items():
                key = f"{number}.{name}"
                if out is None:
                    kept[key] = tensor.to(device, copy=True).contiguous()
                else:
                    out.tensors[key].copy_(tensor)
        return PreparedExperts(self.layout_id, problem, kept) if out is None else out

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add up the experts in the order of their numbers."""
        problem = prepared.problem
        chosen = self.locate(topk_ids, expert_map, problem)
        y = torch.zeros(x.shape[0], problem.hidden, dtype=torch.float32, device=x.device)
        for number in range(problem.experts):
            here = chosen == number
            factor = torch.where(here, topk_weights, 0.0).sum(-1, keepdim=True)
            y = self.add(y, self.weigh(x.to(torch.float32), factor, prepared, number), here.any(-1, keepdim=True))
        return y.to(x.dtype)

    def locate(self, ids: torch.Tensor, expert_map: torch.Tensor | None, problem: MoEProblem) -> torch.Tensor:
        """Return the numbers of the experts that ids name; anything outside 0 … E-1 for none."""
        if expert_map is None:
            return ids
        size = expert_map.shape[0]
        return torch.where((ids >= 0) & (ids < size), expert_map[ids.clamp(0, size - 1).long()], -1)

    def add(self, y: torch.Tensor, output: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Return float32 y with what one expert gives, in the rows `[M, 1]` that chose it."""
        return y + torch.where(here, output, 0.0)

    def weigh(self, x: torch.Tensor, factor: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Return what one expert makes of float32 x, times the router's weights `[M, 1]`."""
        if prepared.problem.router_weight_on_input:
            return self.expert(x * factor, prepared, number)
        return self.expert(x, prepared, number) * factor

    def expert(self, x: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Return what one expert makes of float32 x `[M, H]`."""
        problem, weights = prepared.problem, self.weights(prepared, number)
        stored = zip(weights.w13, weights.a13, strict=True)
        parts = [self.product(self.operand(x, problem, params), weight) for weight, params in stored]
        product = torch.cat(parts, dim=-1)
        if weights.b13:
            product = product + torch.cat([bias.to(torch.float32) for bias in weights.b13])
        h = self.between(product, problem.function).to(getattr(torch, problem.dtype)).to(torch.float32)
        output = self.product(self.operand(h, problem, weights.a2), weights.w2)
        return output if weights.b2 is None else output + weights.b2.to(torch.float32)

    def operand(self, x: torch.Tensor, problem: MoEProblem, params: ActivationParams | None) -> torch.Tensor:
        """Return what float32 x becomes before a product."""
        return x

    def product(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Return `x W^T` in float32."""
        return torch.nn.functional.linear(x, weight.dequantize())

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Return f of a float32 first product."""
        if not function.gated:
            return self.named(product, function)
        gate, up = product.chunk(2, dim=-1)
        if function.limit is not None:
            gate = torch.minimum(gate, gate.new_tensor(function.limit))
            up = up.clamp(-function.limit, function.limit)
        return self.named(gate, function) * (up + function.up_offset)

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Return the function by its definition."""
        match function.name:
            case "silu":
                return z / (1 + torch.exp(-function.alpha * z))
            case "gelu":
                return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            case "gelu_tanh":
                return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))
            case "relu":
                return z.clamp(min=0)
            case "relu2":
                return z.clamp(min=0) * z

    def weights(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Return one expert's weights and what is stored with them."""
        problem, held = prepared.problem, prepared.tensors
        count = len(problem.w13)
        names = [f"w13.{part}" for part in range(count)]
        return ExpertWeights(
            tuple(_weight(held, f"{number}.{name}", spec) for name, spec in zip(names, problem.w13, strict=True)),
            _weight(held, f"{number}.w2", problem.w2),
            tuple(held[f"{number}.b13.{part}"] for part in range(count)) if problem.bias else (),
            held.get(f"{number}.b2"),
            tuple(_params(held, f"{number}.a13.{part}") for part in range(count)),
            _params(held, f"{number}.a2"),
        )

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's values."""
        weights = self.weights(prepared, expert)
        return torch.cat([part.dequantize() for part in weights.w13]), weights.w2.dequantize()

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights; they are what is held."""
        weights = self.weights(prepared, expert)
        return ExpertWeights(weights.w13, weights.w2)


class QuantizingExperts(PlainExperts):
    """The same with what enters each product quantized as the file permits."""

    name = "testkit.quantizing_experts"

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept problems whose file permits to quantize x by a rule that experts have."""
        spec = problem.activation
        if spec is None:
            return Rejected("activation", "the file permits none", "testkit.experts is for x as it is")
        if spec.dynamic and (spec.granularity == "tensor" or spec.element is ElementType.UINT8):
            return Rejected("activation", f"no rule for {spec.describe()}")
        verdict = super().supports(problem, platform)
        return replace(verdict, quantizes_x=True) if isinstance(verdict, Accepted) else verdict

    def operand(self, x: torch.Tensor, problem: MoEProblem, params: ActivationParams | None) -> torch.Tensor:
        """Quantize it."""
        if problem.activation is None:
            raise ValueError("the file does not permit to quantize x")
        return fake_quantize(x, problem.activation, ActivationParams() if params is None else params)


def expert_tensors(expert: ExpertWeights) -> dict[str, torch.Tensor]:
    """All tensors of an expert by name."""
    named = {f"w13.{part}.{name}": t for part, w in enumerate(expert.w13) for name, t in weight_tensors(w).items()}
    named |= {f"w2.{name}": tensor for name, tensor in weight_tensors(expert.w2).items()}
    named |= {f"b13.{part}": bias for part, bias in enumerate(expert.b13)}
    named |= {} if expert.b2 is None else {"b2": expert.b2}
    for where, params in (*((f"a13.{part}", each) for part, each in enumerate(expert.a13)), ("a2", expert.a2)):
        stored = {f"{where}.{name}": getattr(params, name, None) for name in _OF_ACTIVATIONS}
        named |= {name: tensor for name, tensor in stored.items() if tensor is not None}
    return named


def _weight(held: Mapping[str, torch.Tensor], name: str, spec: WeightSpec) -> Weight:
    found = {each: held.get(f"{name}.{each}") for each in _OF_WEIGHTS}
    return Weight(spec=spec, **found)  # type: ignore[arg-type]  # codes and scales are always there


def _params(held: Mapping[str, torch.Tensor], name: str) -> ActivationParams | None:
    found = [held.get(f"{name}.{each}") for each in _OF_ACTIVATIONS]
    return None if all(tensor is None for tensor in found) else ActivationParams(*found)
