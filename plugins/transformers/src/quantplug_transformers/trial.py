"""
Whether a class of experts computes what the rules of its family say: it is asked, on a few small numbers.

Names of functions and fields do not tell everything (limits, offsets, where the router's weight goes); a class that
does anything else than its rules say would otherwise run, and be wrong without a word.
"""

from __future__ import annotations

import copy
import inspect
from itertools import product
from typing import TYPE_CHECKING

import torch

from quantplug.errors import PlanError
from quantplug.expertfunction import between
from quantplug_transformers.experts import BIAS, DOWN, FIRST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug.expertrules import ExpertLayer

# Sides that differ, so that nothing fits that is turned; rows and products large enough that limits are reached.
_HIDDEN, _INTERMEDIATE, _ROWS = 6, 4, 24
_SPREAD = 3.0
# f is computed in float32 by not more than 16 operations, each off by half a unit in the last of 24 places.
_ROUNDING = 16 * 2.0**-24


def check_class(path: str, module: torch.nn.Module, layer: ExpertLayer) -> None:
    """
    Ask a module of experts for its answer to small random weights, and compare it with what the rules make of them.

    Args:
        path: its path in the model.
        module: as its class builds it, on any device; it is not changed.
        layer: what the rules say.

    Raises:
        PlanError: `QP-PLAN-MODEL` when it answers differently in every layout that families use, or not at all.
    """
    sample = _Sample(layer, bias=DOWN + BIAS in dict(module.named_parameters(recurse=False)))
    wanted, bound = sample.answer()
    failures = []
    answered = False
    for parameters in sample.layouts(gated=layer.function.gated):
        try:
            found = _ask(module, parameters, sample)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            failures.append(f"{type(error).__name__}: {str(error)[:200]}")
            continue
        answered = True
        if found.shape == wanted.shape and bool(((found - wanted).abs() <= bound).all()):
            return
    said = layer.function.describe() + ("" if answered else f" ({failures[0]})")
    raise PlanError(
        "QP-PLAN-MODEL",
        path,
        f"{type(module).__name__} does not compute what the rules of its family say, {said}",
        expected="experts whose function, router weights and biases are those of the rules",
        fix="Describe the family: a plugin's quantplug_architectures says what lies between the products.",
    )


class _Sample:
    """Random weights of a few experts, rows, and a router's answers, in float64."""

    def __init__(self, layer: ExpertLayer, *, bias: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self._layer = layer
        count, parts = layer.count, 1 + layer.function.gated

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64) * _SPREAD

        self._first = [numbers(count, _INTERMEDIATE, _HIDDEN) for _ in range(parts)]
        self._down = numbers(count, _HIDDEN, _INTERMEDIATE)
        self._first_bias = [numbers(count, _INTERMEDIATE) for _ in range(parts)] if bias else []
        self._down_bias = numbers(count, _HIDDEN) if bias else None
        self.rows = numbers(_ROWS, _HIDDEN)
        self.weights = torch.rand(_ROWS, layer.top_k, generator=draw, dtype=torch.float64)
        self.ids = torch.rand(_ROWS, count, generator=draw).argsort(dim=1)[:, : layer.top_k]

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the rules say, and how far float32 in the middle may take it off, both `[M, H]`."""
        result, bound = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        for slot in range(self._layer.top_k):
            chosen, weight = self.ids[:, slot], self.weights[:, slot, None]
            before = weight if self._layer.router_weight_on_input else torch.ones_like(weight)
            products = [torch.einsum("mh,mih->mi", self.rows * before, part[chosen]) for part in self._first]
            if self._first_bias:
                products = [p + bias[chosen] for p, bias in zip(products, self._first_bias, strict=True)]
            middle = between(torch.cat(products, dim=-1), self._layer.function)
            output = torch.einsum("mi,mhi->mh", middle, self._down[chosen])
            if self._down_bias is not None:
                output = output + self._down_bias[chosen]
            after = torch.ones_like(weight) if self._layer.router_weight_on_input else weight
            result += output * after
            largest = torch.cat([torch.ones_like(products[0]), *(p.abs() for p in products)], dim=-1).amax(-1)
            reach = largest[:, None, None].square() * self._down[chosen].abs()
            bound += reach.sum(-1) * after * _ROUNDING
        return result, bound

    def layouts(self, *, gated: bool) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the weights as parameters: gate and up one after the other or in turns, `[out, in]` or `[in, out]`."""
        first = FIRST[0] if gated else FIRST[1]
        for in_turns, turned in product((False, True) if gated else (False,), (False, True)):
            weight = self._joined(self._first, in_turns=in_turns)
            parameters = {
                first: weight.transpose(1, 2) if turned else weight,
                DOWN: self._down.transpose(1, 2) if turned else self._down,
            }
            if self._down_bias is not None:
                bias = self._joined(self._first_bias, in_turns=in_turns)
                parameters |= {first + BIAS: bias, DOWN + BIAS: self._down_bias}
            yield parameters

    @staticmethod
    def _joined(parts: list[torch.Tensor], *, in_turns: bool) -> torch.Tensor:
        return torch.stack(parts, dim=2).flatten(1, 2) if in_turns else torch.cat(parts, dim=1)


@torch.no_grad()
def _ask(module: torch.nn.Module, parameters: dict[str, torch.Tensor], sample: _Sample) -> torch.Tensor:
    """Run the class' plain code, whichever implementation the model is set to."""
    asked = copy.copy(module)
    own = {name: torch.nn.Parameter(value.contiguous(), requires_grad=False) for name, value in parameters.items()}
    asked.__dict__["_parameters"] = own
    forward = inspect.unwrap(type(module).forward)
    answer: torch.Tensor = forward(asked, sample.rows, sample.ids, sample.weights)
    return answer
