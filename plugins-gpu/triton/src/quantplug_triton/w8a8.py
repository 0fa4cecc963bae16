"""
The kernel for a quantized x: 8-bit codes times 8-bit or 4-bit codes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug_triton.w8a8fit import quantized_verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class TritonQuantizedKernel(LinearKernel):
    """
    `y = x W^T + b` with x quantized as the file permits: to FP8 or FP4 for weights in FP8, FP4 or int4, to int8 for
    those in int8 or int4.

    Products of codes are exact everywhere. Integers are summed exactly; FP8 is multiplied as it is where GPUs have it
    and it is known what their sums lose, and in bfloat16 elsewhere. Results are the same every time.
    """

    __slots__ = ()

    name = "triton.w8a8"
    layout_id = "triton.rows"
    traits = Traits(uniform_segments=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept symmetric codes in the order of inputs, where groups of the weight and of x are whole chunks."""
        return quantized_verdict(problem, platform)

    def probe(self, platform: Platform) -> Rejected | None:
        """Compile and try a small product whose result is known exactly."""
        return _probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep codes of eight bits as they are, and put those of four in pairs; K is filled up to whole chunks."""
        from quantplug_triton.w8a8prepare import prepare_quantized

        return prepare_quantized(problem, segments, activation, device, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x, within the product or before it, and multiply."""
        from quantplug_triton.w8a8launch import call_quantized

        return call_quantized(x, prepared, bias)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the values `[N, K]`, computed in float32 by ordinary operators."""
        import torch

        from quantplug_triton.w8a8prepare import canonical_quantized

        return torch.cat([weight.dequantize(dtype) for weight in canonical_quantized(prepared)])

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where nothing was rounded on the way in."""
        from quantplug_triton.w8a8prepare import unprepare_quantized

        return unprepare_quantized(prepared)


@cache
def _probe() -> Rejected | None:
    """Return why the kernel cannot be used on this machine, or None."""
    try:
        import triton
    except ImportError as error:
        return Rejected("dependency", f"triton cannot be imported: {error}", "pip install triton")
    import torch

    from quantplug_triton.w8a8launch import linear_quantized

    x = torch.zeros(3, 128, dtype=torch.bfloat16, device="cuda")
    x[0, 3], x[1, 100], x[2, 127] = 448, -448, 448
    small = ((torch.arange(64 * 128, device="cuda") % 15).view(64, 128) - 7).to(torch.float32)
    scales = torch.full((1, 64), 0.5, device="cuda")
    form = [2, 8, 0, 128, 1, 1]
    try:
        y = linear_quantized(x, small.to(torch.float8_e4m3fn), scales, None, None, form, "float8_e4m3fn", "token")
    except (RuntimeError, OSError, ValueError) as error:
        return Rejected("probe", f"Triton {triton.__version__} cannot build or run it: {error}", "install a C compiler")
    # The largest element is its own scale's largest code, so that each product of a row is one code of the weight.
    wanted = x.to(torch.float32) @ small.t() / 2
    if not torch.allclose(y.to(torch.float32), wanted, rtol=2**-7, atol=0):
        return Rejected("probe", f"a small product is wrong with Triton {triton.__version__}", "report it")
    return None
