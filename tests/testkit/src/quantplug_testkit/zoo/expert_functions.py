"""
Kernels for experts that compute something else between the products, or quantize something else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.kernel import Accepted, Verdict
from quantplug.weight import ActivationParams
from quantplug_testkit.quantizing import fake_quantize
from quantplug_testkit.zoo.broken_experts import BrokenExperts, MisquantizingExperts

if TYPE_CHECKING:
    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.moe import ExpertFunction, MoEProblem
    from quantplug.platform import Platform


class LimitIgnored(BrokenExperts):
    """Does not clamp."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Forget the limit."""
        return super().between(product, replace(function, limit=None))


class LimitOnBothSidesOfGate(BrokenExperts):
    """Clamps gate from below, too."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Clamp everything."""
        if function.limit is not None:
            product = product.clamp(-function.limit, function.limit)
        return super().between(product, function)


class LimitOnGateAlone(BrokenExperts):
    """Clamps gate and not up."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Clamp gate from above."""
        if function.gated and function.limit is not None:
            gate, up = product.chunk(2, dim=-1)
            product = torch.cat([gate.clamp(max=function.limit), up], dim=-1)
        return super().between(product, replace(function, limit=None))


class AlphaIgnored(BrokenExperts):
    """Takes 1 for alpha."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Forget alpha."""
        return super().between(product, replace(function, alpha=1.0))


class OffsetIgnored(BrokenExperts):
    """Takes 0 for up's offset."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Forget the offset."""
        return super().between(product, replace(function, up_offset=0.0))


class OffsetBeforeTheLimit(BrokenExperts):
    """Adds the offset to up before it clamps."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Shift up by itself."""
        if not function.gated:
            return super().between(product, function)
        gate, up = product.chunk(2, dim=-1)
        shifted = torch.cat([gate, up + function.up_offset], dim=-1)
        return super().between(shifted, replace(function, up_offset=0.0))


class TanhForGelu(BrokenExperts):
    """Computes the tanh form for the exact one."""

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Take the other."""
        return super().named(z, replace(function, name="gelu_tanh") if function.name == "gelu" else function)


class ExactGeluForTanh(BrokenExperts):
    """Computes the exact form for the tanh one."""

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Take the other."""
        return super().named(z, replace(function, name="gelu") if function.name == "gelu_tanh" else function)


class SiluForEverything(BrokenExperts):
    """Knows one function."""

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Take silu."""
        return super().named(z, replace(function, name="silu"))


class ReluWithoutSquare(BrokenExperts):
    """Takes relu2 for relu."""

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Do not square."""
        return super().named(z, replace(function, name="relu") if function.name == "relu2" else function)


class CoarseSigmoid(BrokenExperts):
    """Evaluates the sigmoid by a tanh of eleven bits, as GPUs offer it."""

    def named(self, z: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Round tanh to bfloat16's neighbour of eleven bits."""
        if function.name != "silu":
            return super().named(z, function)
        return z * (0.5 + 0.5 * torch.tanh(0.5 * function.alpha * z).half().float())


class RoundedThroughBfloat16(BrokenExperts):
    """Keeps what lies between the products in bfloat16, whatever the problem's dtype is."""

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Round."""
        return super().between(product, function).bfloat16().float()


class UndeclaredGateUp(BrokenExperts):
    """Rounds the first product to the problem's dtype and does not say so."""

    caught_by = ("test_result_is_within_the_derived_bound",)

    def expert(self, x: torch.Tensor, prepared: PreparedExperts, number: int) -> torch.Tensor:
        """Remember the dtype."""
        self._dtype = getattr(torch, prepared.problem.dtype)
        return super().expert(x, prepared, number)

    def between(self, product: torch.Tensor, function: ExpertFunction) -> torch.Tensor:
        """Round it."""
        return super().between(product.to(self._dtype).float(), function)


class UndeclaredQuantization(MisquantizingExperts):
    """Quantizes what enters the products and does not say so."""

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Deny it."""
        verdict = super().supports(problem, platform)
        return replace(verdict, quantizes_x=False) if isinstance(verdict, Accepted) else verdict


class QuantizesTheFirstAlone(MisquantizingExperts):
    """Leaves h as it is."""

    def operand(self, x: torch.Tensor, problem: MoEProblem, params: ActivationParams | None) -> torch.Tensor:
        """Quantize x of H features only."""
        return super().operand(x, problem, params) if x.shape[-1] == problem.hidden else x


class OneScaleForAllRows(MisquantizingExperts):
    """Shares the scale of a token among all rows."""

    def operand(self, x: torch.Tensor, problem: MoEProblem, params: ActivationParams | None) -> torch.Tensor:
        """Take one for the tensor."""
        spec = problem.activation
        if spec is None or spec.granularity != "token" or not spec.dynamic:
            return super().operand(x, problem, params)
        return fake_quantize(x, replace(spec, granularity="tensor"), ActivationParams())


class StoredScaleOfTheFirstExpert(MisquantizingExperts):
    """Quantizes the x of all experts by what is stored for the first."""

    def weights(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take expert 0's."""
        first = super().weights(prepared, 0)
        return replace(super().weights(prepared, number), a13=first.a13, a2=first.a2)


class StoredScaleOfGateForUp(MisquantizingExperts):
    """Quantizes x once for gate and up."""

    def weights(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take gate's for both."""
        weights = super().weights(prepared, number)
        return replace(weights, a13=weights.a13[:1] * len(weights.a13))


class StoredScaleOfXForH(MisquantizingExperts):
    """Quantizes h by what is stored for x."""

    def weights(self, prepared: PreparedExperts, number: int) -> ExpertWeights:
        """Take gate's for down."""
        weights = super().weights(prepared, number)
        return replace(weights, a2=weights.a13[0])


class RoundsHToZero(MisquantizingExperts):
    """Cuts codes off instead of rounding them, in the second product."""

    def operand(self, x: torch.Tensor, problem: MoEProblem, params: ActivationParams | None) -> torch.Tensor:
        """Cut off h where its codes are integers with a scale for each row."""
        spec = problem.activation
        if spec is None or spec.element != "int8" or not spec.dynamic or x.shape[-1] == problem.hidden:
            return super().operand(x, problem, params)
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (x / scale).trunc() * scale
