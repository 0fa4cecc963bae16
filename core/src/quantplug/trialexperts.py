"""
One kernel for experts on a problem of made-up operands: is its result right, and how long does it take.

As `trial`, for both products of an expert and the function between them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantplug.expertfunction import between
from quantplug.expertweights import ExpertWeights
from quantplug.samples import dense_values, largest_code, sample_activation, sample_weights, sample_x
from quantplug.spec import ElementType
from quantplug.stopwatch import cold_copies, per_call
from quantplug.trial import DISTINCT_ROWS, Trial, tried
from quantplug.trialbound import compare, linear_error, stored, units_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantplug.expertweights import PreparedExperts
    from quantplug.kernel import Accepted, Cast
    from quantplug.moe import MoEProblem
    from quantplug.moekernel import MoEKernel
    from quantplug.trialbound import Unit
    from quantplug.weight import Weight

_EVALUATED = 2.0**-17
"""Of |f|: what evaluating any of the functions in float32 may be off by, the loosest erf in use included."""

_STEEPEST = 1.13
"""The largest slope of any of the functions but relu2; that of gelu."""

_FLOAT32 = 2.0**-24


class ExpertWorkload:
    """
    Experts with operands, on which kernels take their turn.

    Args:
        problem: what is to run.
        device: where.
        rows: numbers of rows M, rising.
        seconds: how long each number of rows is measured, about.
    """

    def __init__(self, problem: MoEProblem, device: torch.device, rows: Sequence[int], seconds: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.problem = problem
        self._device = device
        self._rows = rows
        self._seconds = seconds
        self._checked = sample_x(problem.first, DISTINCT_ROWS, generator).to(device)
        # Few experts are looked at, the first and the last among them; all are timed.
        count = min(problem.experts, problem.top_k + 4)
        pool = torch.linspace(0, problem.experts - 1, count).round().to(torch.int64)
        self._checked_ids = pool[_distinct(DISTINCT_ROWS, count, problem.top_k, generator)].to(device)
        self._checked_weights = _router(DISTINCT_ROWS, problem.top_k, generator).to(device)
        most = max(rows)
        self._x = torch.randn(most, problem.hidden, generator=generator).to(device, self._checked.dtype)
        self._ids = _distinct(most, problem.experts, problem.top_k, generator).to(device)
        self._weights = _router(most, problem.top_k, generator).to(device)
        self._found: dict[tuple[tuple[Cast, ...], bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def touch(self) -> None:
        """Use the device; raises when it cannot be used any more."""
        float(self._checked[0, 0] + 1)

    def run(self, kernel: MoEKernel, verdict: Accepted) -> Trial:
        """Prepare, check and time a kernel, which accepted the problem with that verdict."""
        return tried(lambda: self._run(kernel, verdict))

    def _run(self, kernel: MoEKernel, verdict: Accepted) -> Trial:
        prepared = kernel.prepare(self.problem, self._experts(range(self.problem.experts)), self._device)
        for rows in self._rows:
            index = torch.arange(rows, device=self._device) % DISTINCT_ROWS
            x, weights, ids = self._checked[index], self._checked_weights[index], self._checked_ids[index]
            exact, bound = self._exact(verdict)
            wrong = compare(kernel.apply(x, weights, ids, prepared), exact, bound, self._x.dtype)
            if wrong:
                return Trial(nbytes=prepared.nbytes, wrong=wrong)
        turns = self._copies(prepared)

        def call(turn: PreparedExperts, rows: int) -> torch.Tensor:
            return kernel.apply(self._x[:rows], self._weights[:rows], self._ids[:rows], turn)

        graph = kernel.traits.graph_safe
        times = [
            (m, per_call(partial(call, rows=m), turns, self._device, seconds=self._seconds, graph=graph))
            for m in self._rows
        ]
        return Trial(tuple(times), prepared.nbytes)

    def _experts(self, numbers: Sequence[int]) -> Iterator[ExpertWeights]:
        """Yield experts by their numbers, each the same every time."""
        problem = self.problem
        dtype: torch.dtype = getattr(torch, problem.dtype)
        activation = sample_activation(problem.activation)
        for number in numbers:
            generator = torch.Generator().manual_seed(1 + number)
            w13, [w2] = sample_weights(problem.first, generator), sample_weights(problem.second, generator)
            # What comes out of the first product is near 1 then, so that the function does something.
            w13 = [_shrunk(weight, problem.hidden) for weight in w13]
            b13: tuple[torch.Tensor, ...] = ()
            if problem.bias:
                b13 = tuple(torch.randn(problem.intermediate, generator=generator).to(dtype) for _ in w13)
            yield ExpertWeights(
                tuple(w13), w2, b13, torch.randn(problem.hidden, generator=generator).to(dtype) if b13 else None,
                (activation,) * len(w13), activation,
            )  # fmt: skip

    def _copies(self, prepared: PreparedExperts) -> list[PreparedExperts]:
        """Return copies that take turns, as a layer has them."""
        whole = cold_copies(prepared.named_tensors(), self._device)
        found = [prepared]
        for tensors in whole[1:]:
            parts = tuple(
                replace(part, tensors={name: tensors[f"{number}.{name}"] for name in part.tensors})
                for number, part in enumerate(prepared.parts)
            )
            found.append(replace(prepared, tensors={name: tensors[name] for name in prepared.tensors}, parts=parts))
        return found

    def _exact(self, verdict: Accepted) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the exact result for the rows that are checked, and how far a kernel may be from it."""
        key = verdict.casts, verdict.quantizes_x
        if key not in self._found:
            self._found[key] = self._mixture(verdict)
        return self._found[key]

    def _mixture(self, verdict: Accepted) -> tuple[torch.Tensor, torch.Tensor]:
        units, x = units_of(verdict.casts), self._checked
        exact = torch.zeros(x.shape, dtype=torch.float64, device=self._device)
        error, size = torch.zeros_like(exact), torch.zeros_like(exact)
        numbers = [int(number) for number in self._checked_ids.unique()]
        for number, expert in zip(numbers, self._experts(numbers), strict=True):
            rows, slots = (self._checked_ids == number).nonzero(as_tuple=True)
            factor = self._checked_weights[rows, slots].to(torch.float64)[:, None]
            given, off = x[rows].to(torch.float64), None
            if self.problem.router_weight_on_input:
                given = given * factor
                off = stored(given, given.abs() * _FLOAT32, x.dtype)
                factor = torch.ones_like(factor)
            output, far = self._expert(given, off, expert, units, quantizes_x=verdict.quantizes_x)
            if "expert" in units:
                far = far + 2 * units["expert"].roundoff * (output.abs() + far) + 2 * units["expert"].half_smallest
            exact[rows] += factor * output
            error[rows] += factor * far
            size[rows] += factor * (output.abs() + far)
        error += (self.problem.top_k + 4) * _FLOAT32 * size
        return exact, stored(exact, error, x.dtype)

    def _expert(
        self,
        x: torch.Tensor,
        off: torch.Tensor | None,
        expert: ExpertWeights,
        units: dict[str, Unit],
        *,
        quantizes_x: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._device
        bias = torch.cat(expert.b13).to(device) if expert.b13 else None
        if off is not None and quantizes_x:
            off = off + self._quantized(x, off)
        product, far = linear_error(x, off, dense_values(expert.w13, device), expert.w13, bias, units)
        if "gate_up" in units:
            far = far + units["gate_up"].roundoff * (product.abs() + far) + units["gate_up"].half_smallest
        hidden, off = self._between(product, far)
        off = torch.maximum(off, stored(hidden, off, self._x.dtype))
        if quantizes_x:
            off = off + self._quantized(hidden, off)
        b2 = None if expert.b2 is None else expert.b2.to(device)
        return linear_error(hidden, off, dense_values([expert.w2], device), [expert.w2], b2, units)

    def _between(self, product: torch.Tensor, far: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return f of a product, and how far a kernel may be from it that is off by `far` before."""
        function = self.problem.function
        hidden = between(product, function)
        gate, up = product.chunk(2, dim=-1) if function.gated else (product, torch.ones_like(product))
        gate_far, up_far = far.chunk(2, dim=-1) if function.gated else (far, torch.zeros_like(far))
        if function.gated and function.limit is not None:
            gate, up = gate.clamp(max=function.limit), up.clamp(-function.limit, function.limit)
        up = up + function.up_offset if function.gated else up
        steepest = 2 * (gate.abs() + gate_far) if function.name == "relu2" else _STEEPEST
        highest = gate.square() if function.name == "relu2" else gate.abs()
        error = (up.abs() + up_far) * steepest * gate_far + highest * up_far
        return hidden, error + _EVALUATED * (highest * (up.abs() + up_far) + error)

    def _quantized(self, x: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
        """Return how far what x is quantized to may be from it: a step, and what is cut off; x is off by `off`."""
        activation = self.problem.activation
        if activation is None:
            return torch.zeros_like(x)
        size = x.abs() + off
        largest = largest_code(activation.element)
        params = sample_activation(activation)
        if activation.dynamic or params is None or params.scale is None:
            # Scales of powers of two are up to twice what the largest of x asks for.
            scale = 2 * (size.max() if activation.granularity == "tensor" else size.amax(-1, keepdim=True)) / largest
        else:
            scale = params.scale.to(x.device, torch.float64)
        if activation.element is ElementType.FLOAT4_E2M1FN or not activation.element.floating:
            step = 2 * scale if activation.element.floating else scale
        else:
            step = torch.maximum(size / 4, scale / 64)
        return step + (size - largest * scale).clamp(min=0)


def _shrunk(weight: Weight, inputs: int) -> Weight:
    """Return a weight whose product with the x of `sample_x` has elements near 1."""
    if weight.global_scale is not None:
        return replace(weight, global_scale=weight.global_scale / inputs)
    if weight.scales.dtype == torch.float8_e8m0fnu:
        lower = (weight.scales.view(torch.uint8) - inputs.bit_length()).view(torch.float8_e8m0fnu)
        return replace(weight, scales=lower)
    return replace(weight, scales=(weight.scales.to(torch.float32) * 4 / inputs).to(weight.scales.dtype))


def _distinct(rows: int, experts: int, chosen: int, generator: torch.Generator) -> torch.Tensor:
    """Return int64 `[rows, chosen]`, distinct numbers below `experts` in each row."""
    return torch.rand(rows, experts, generator=generator).topk(chosen, dim=1).indices


def _router(rows: int, chosen: int, generator: torch.Generator) -> torch.Tensor:
    """Return float32 `[rows, chosen]`, weights that add up to about 1."""
    return (torch.rand(rows, chosen, generator=generator) + 0.5) / chosen
