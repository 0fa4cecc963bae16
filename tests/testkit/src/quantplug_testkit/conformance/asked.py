"""
What the tests of `supports` ask about, for kernels of either kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantplug.platform import Platform
from quantplug.spec import PerBlock, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.kernel import LinearKernel
    from quantplug.moekernel import MoEKernel
    from quantplug.spec import ActivationSpec, Granularity, WeightSpec


REASONS = (
    "platform", "arch", "dtype", "element", "granularity", "shape", "act_order", "segments", "activation", "dependency",
)  # fmt: skip
"""Codes that `supports` may refuse with; the others belong to the core."""


class Asked:
    """
    What a vendor's conformance class states, and what a kernel is asked.

    Attributes:
        kernel: the kernel under test.
        platform: what it is asked to run on; it must be the machine at hand.
        device: torch device that its weights and inputs lie on.
        known_casts: what it may declare that it rounds.
        reasons: codes that it may refuse with.
    """

    kernel: LinearKernel | MoEKernel
    platform: Platform = Platform.parse("cpu")
    device: str = "cpu"
    known_casts: tuple[str, ...] = ()
    reasons: tuple[str, ...] = REASONS

    def questions(self) -> Sequence[Any]:
        """Return all problems that the kernel is asked about."""
        raise NotImplementedError

    def accepted(self) -> Sequence[Any]:
        """Return the hazards that the kernel is tried on."""
        raise NotImplementedError

    def weights_of(self, problem: Any) -> Sequence[WeightSpec]:
        """Return the numeric contracts of a problem's weights."""
        raise NotImplementedError

    def sizes_of(self, problem: Any) -> set[int]:
        """Return the sizes that a refusal may be about."""
        raise NotImplementedError

    def words_of(self, code: str, problem: Any) -> set[str]:
        """Return what else a refusal with that code may name."""
        raise NotImplementedError

    def offending(self, code: str, problem: Any, platform: Platform) -> set[str]:
        """Return the values of a problem that a refusal with that code may be about; one of them must be named."""
        specs = self.weights_of(problem)
        return _offending(code, specs, problem.dtype, problem.activation, platform) | (
            {str(size) for size in self.sizes_of(problem)} if code == "shape" else self.words_of(code, problem)
        )


def _offending(
    code: str, specs: Sequence[WeightSpec], dtype: str, activation: ActivationSpec | None, platform: Platform
) -> set[str]:
    match code:
        case "platform":
            return {platform.kind, str(platform)}
        case "arch":
            return {platform.arch or platform.kind, str(platform), *platform.features}
        case "dtype":
            factors = {"global scale"} if any(spec.global_scale for spec in specs) else set()
            return {dtype, *(spec.scale_dtype for spec in specs)} | factors
        case "element":
            return {str(spec.element) for spec in specs} | {str(spec.element.bits) for spec in specs}
        case "granularity":
            return {name for spec in specs for name in _granularity_names(spec.granularity)}
        case "act_order":
            return {"act-order", "act_order", "g_idx"}
        case "segments":
            return {spec.describe() for spec in specs}
        case "activation":
            return {"none", "weight-only"} if activation is None else {activation.element, activation.granularity}
        case "dependency":
            return {text for version in platform.versions for text in version}
        case _:
            return set()


def _granularity_names(granularity: Granularity) -> set[str]:
    match granularity:
        case PerTensor():
            return {"per tensor", "PerTensor", "tensor"}
        case PerChannel():
            return {"per channel", "PerChannel", "channel"}
        case PerGroup(size=size):
            return {str(size)}
        case PerBlock(n=n, k=k):
            return {str(n), str(k)}
