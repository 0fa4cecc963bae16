"""
The kernel: weights in FP8 times x in FP8.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug.rowlayout import LAYOUT_ID
from quantplug_cublas.fit import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class CublasKernel(LinearKernel):
    """
    `y = x W^T + b` with x quantized to FP8 as the file permits, through torch's scaled product.

    Sums are promoted to float32 every 128 inputs. Results are the same every time.
    """

    __slots__ = ()

    name = "cublas.w8a8"
    layout_id = LAYOUT_ID
    traits = Traits(uniform_segments=True)
    fast: ClassVar[bool] = False
    """Whether sums are never promoted ("fast accumulation")."""

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """
        Accept FP8 codes per tensor, channel or block of 128 x 128, and x in FP8 per tensor, token or group of 128, on
        GPUs of compute capability 8.9 and 9.0.
        """
        return verdict(problem, platform, fast=self.fast)

    def probe(self, platform: Platform) -> Rejected | None:
        """Try a small product whose result is known exactly."""
        return _probe() if platform.kind == "cuda" else None

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep codes as they are, filled up to what cuBLAS takes, and scales in float32."""
        from quantplug.rowprepare import prepare

        return prepare(problem, segments, activation, device, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Quantize x and multiply."""
        from quantplug_cublas.product import multiply

        return multiply(x, prepared, bias, fast=self.fast)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return `code * scale`."""
        from quantplug.rowprepare import dequantize

        return dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where no scale was rounded on the way in."""
        from quantplug.rowprepare import unprepare

        return unprepare(prepared)


class FastCublasKernel(CublasKernel):
    """
    The same with sums that stay in the short accumulator of the tensor cores, as inference engines have them: faster
    for many rows, and what is below 2^-13 of a sum so far is lost.
    """

    __slots__ = ()

    name = "cublas.w8a8.fast"
    traits = Traits(uniform_segments=True, by_request=True)
    fast = True


@cache
def _probe() -> Rejected | None:
    """Return why the kernel cannot be used on this machine, or None."""
    import torch

    from quantplug_cublas.product import linear

    if not hasattr(torch, "_scaled_mm"):
        return Rejected("probe", f"torch {torch.__version__} has no operator _scaled_mm", "use torch 2.9 or later")
    x = torch.zeros(3, 512, dtype=torch.bfloat16, device="cuda")
    x[0, 3], x[1, 300], x[2, 511] = 448, -448, 448
    codes = ((torch.arange(32 * 512, device="cuda") % 15).view(32, 512) - 7).to(torch.float8_e4m3fn)
    scales = torch.full((1, 32), 0.5, device="cuda")
    try:
        y = linear(x, codes, scales, None, torch.ones(1, device="cuda"), None, 32, "token", "float8_e4m3fn", False)
    except RuntimeError as error:
        return Rejected("probe", f"torch {torch.__version__}: {error}".splitlines()[0], "use torch 2.9 or later")
    # The largest element is its own scale's largest code, so that each product of a row is one code of the weight.
    wanted = x.to(torch.float32) @ codes.to(torch.float32).t() / 2
    if not torch.allclose(y.to(torch.float32), wanted, rtol=2**-8, atol=0):
        return Rejected("probe", f"a small product is wrong with torch {torch.__version__}", "report it")
    return None
