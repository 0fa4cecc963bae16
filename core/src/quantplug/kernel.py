"""
The hook an implementation provides: whether it can run a layer, at what estimated cost, and the running itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


@dataclass(frozen=True, slots=True)
class Cost:
    """
    An estimate of one call's duration: `fixed_us + rows * row_us` microseconds.

    A claim that `quantplug tune` can check, not a priority: the order between kernels follows from it.

    Attributes:
        fixed_us: of a call, whatever the number of rows.
        row_us: of each row.
        many: the cost for many rows where that is less, or None: of another way that the kernel itself takes, or since
            more rows touch no more weights (of experts: all there are).
    """

    fixed_us: float
    row_us: float
    many: Cost | None = None

    def at(self, rows: int) -> float:
        """Return the estimated microseconds for M = `rows`."""
        first = self.fixed_us + rows * self.row_us
        return first if self.many is None else min(first, self.many.at(rows))

    def plus(self, other: Cost) -> Cost:
        """Return the cost of two calls, each of which takes its own way."""
        many = None
        if self.many is not None or other.many is not None:
            many = (self.many or self).plus(other.many or other)
        return Cost(self.fixed_us + other.fixed_us, self.row_us + other.row_us, many)


@dataclass(frozen=True, slots=True)
class Cast:
    """
    A rounding that a kernel performs beyond the output's own, and so widens its error bound by exactly that.

    Attributes:
        what: "scales"; "zeros" (`(2^(bits-1) - zero) * scale`, which is added to `(code - 2^(bits-1)) * scale`);
            "weights" (dequantized values); "partials" (the product, before the bias is added); "accumulator" (sums of
            up to 128 products of 8-bit floats, as GPUs of compute capability 8.9 and 9.0 add them up);
            "long_accumulator" (the same, of all K products); or "splits" (parts of the sum over K of 64 inputs or more,
            which are added up in that dtype). The testkit derives its bound from these and refuses others.
        dtype: torch name of the dtype rounded to; "float22_e8m13" for an accumulator.
    """

    what: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """
    A kernel can run the problem.

    Attributes:
        cost: estimated duration on that platform.
        casts: roundings it performs; shown in the plan, used by the conformance bound.
        extra_bytes: bytes it keeps beyond codes and scales at their stored width (padding, wider codes).
        notes: short remarks for the plan ("x is permuted once per call").
        quantizes_x: whether x is quantized as `problem.activation` permits, and exactly so; shown in the plan, and done
            in the same way by the oracle that the kernel is checked against (`quantplug_testkit.oracles.activation`,
            which says what scale belongs to which x, and which roundings are free).
        dequantize_us: estimated microseconds of one `dequantize`; None for one that is made of torch operators. The
            core offers a product that dequantizes at every call for many rows, and estimates it by this.
    """

    cost: Cost
    casts: tuple[Cast, ...] = ()
    extra_bytes: int = 0
    notes: tuple[str, ...] = ()
    quantizes_x: bool = False
    dequantize_us: float | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """
    A kernel cannot run the problem.

    Attributes:
        code: stable reason: "platform", "arch", "dtype", "element", "granularity", "shape", "act_order", "segments",
            "activation", "function" (of experts), "dependency", "probe", "policy" or "error".
        reason: the fact that failed, with its number ("in_features 1000 is not a multiple of 128").
        fix: the nearest that fits, or "".
    """

    code: str
    reason: str
    fix: str = ""


Verdict = Accepted | Rejected


@dataclass(frozen=True, slots=True)
class Traits:
    """
    What holds for every call of a kernel.

    Attributes:
        uniform_segments: needs all segments of a fused layer to share one contract (else the core splits the call).
        graph_safe: may be captured in a device graph.
        dequantize_graph_safe: `dequantize` may be captured, too: it waits for nothing and copies nothing from the host.
        deterministic: the same inputs give the same bits.
        differentiable: `apply` passes gradients on to x, as torch's own operators do. Where it does not, a linear layer
            multiplies them by what `dequantize` of one of its kernels gives; experts, and layers without, refuse.
        tangents: `apply` passes tangents of forward-mode differentiation on from x, as torch's own operators do, which
            refuse where they have no rule. Where it does not, layers refuse: operators of a library have no rule, and
            run as if there were no tangents. A linear layer refuses where any kernel of its decision does not, so that
            no number of rows decides it; experts where the kernel of the call does not.
        fallback: last resort; chosen only when nothing else fits, and then with a warning.
        by_request: chosen only where a policy allows it, or prefers or pins it by its name: it gives up what a caller
            has to agree to, such as the precision of long sums.
    """

    uniform_segments: bool = False
    graph_safe: bool = True
    dequantize_graph_safe: bool = False
    deterministic: bool = True
    differentiable: bool = False
    tangents: bool = False
    fallback: bool = False
    by_request: bool = False


class LinearKernel(ABC):
    """
    One implementation of `y = x W^T + b` on one family of machines.

    A plugin author writes two files: `plugin.py`, whose `quantplug_kernels` returns instances, and the module with the
    class. Both import without torch and without any vendor package; `prepare`, `apply` and `probe` import what they
    need.
    Instances hold no state of a layer.
    """

    __slots__ = ()

    name: ClassVar[str]
    """Unique among installed kernels, family first: "marlin.w4a16"."""
    layout_id: ClassVar[str]
    """Names what `prepare` yields; kernels that share it share one copy of the weights."""
    traits: ClassVar[Traits] = Traits()

    @abstractmethod
    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """
        Say whether this kernel can run the problem on that platform.

        Pure: the same answer on any machine, no import of a vendor package, no look at the machine. Called once per
        distinct problem while planning. Never raises.
        """

    def probe(self, platform: Platform) -> Rejected | None:
        """
        Check this very machine once, before anything is allocated: the operator is there, the compiler works, a tiny
        product is right. Return None when all is well; the refusal joins the trace otherwise.
        """
        return None

    @abstractmethod
    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """
        Bring canonical weights into this kernel's layout, once per layer after loading.

        Layers may be prepared in several threads at once, those for one accelerator one by one.

        Args:
            problem: what `supports` accepted.
            segments: one `Weight` per segment of the problem, on the CPU; they stay the caller's and are not modified.
            activation: what the file stores about x, one per segment; for kernels that quantize x.
            device: where the result lives.
            out: an earlier result of the same problem, to be overwritten in place (weight reload keeps addresses).
        """

    @abstractmethod
    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """
        Return `[..., N]` for x `[..., K]` in the problem's dtype; zero rows are allowed, every element is written.

        Built from operators that have a fake implementation, so that torch.compile and graph capture work. x is not
        modified; it may be non-contiguous. The caller has checked its last size, dtype and device.
        """

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """
        Return the values `[N, K]`, computed in float32 and rounded once to `dtype`, in memory of their own.

        Optional. It serves backward passes, and a kernel that has it gets another one for many rows for free
        (`<name>.dense`), which dequantizes at every call. torch.compile never looks into it.
        """
        raise NotImplementedError(f"kernel {self.name} does not dequantize")

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments again, bit-exact; optional: the way back when the source file is gone."""
        raise NotImplementedError(f"kernel {self.name} has no way back")
