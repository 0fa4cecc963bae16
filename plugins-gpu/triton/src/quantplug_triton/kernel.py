"""
The kernel: weights of any element type, multiplied as they are stored.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from quantplug.kernel import LinearKernel, Rejected, Traits, Verdict
from quantplug_triton.fit import field_bits, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


class TritonKernel(LinearKernel):
    """
    `y = x W^T + b` for integers of 2, 3, 4 and 8 bits, FP8 and FP4, with any granularity and act-order.

    x is never quantized. Codes are exact in the dtype of x, and scales multiply float32 sums, so that nothing else is
    rounded. Results are the same every time.
    """

    __slots__ = ()

    name = "triton.wna16"
    layout_id = "triton.chunks"
    traits = Traits(uniform_segments=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept every element type but the fnuz spellings of FP8, on GPUs from compute capability 8.0 on."""
        return verdict(problem, platform)

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
        """Pack codes chunk by chunk, 64 rows of the weight side by side."""
        from quantplug_triton.prepare import prepare

        return prepare(problem, segments, device, self.layout_id, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply; few rows share the work over K, whose sums are added in a second launch."""
        import torch

        from quantplug_triton.launch import linear
        from quantplug_triton.prepare import kind_of, middle_of

        element = prepared.problem.segments[0].weight.element
        kind, meta, tensors = kind_of(element), prepared.meta, prepared.tensors
        flat = x.reshape(-1, x.shape[-1])
        results, first = [], 0
        for number in range(meta["parts"]):
            rows = meta[f"rows.{number}"]
            results.append(
                linear(
                    flat,
                    tensors[f"codes.{number}"],
                    tensors[f"scales.{number}"],
                    tensors.get(f"zeros.{number}"),
                    tensors.get(f"columns.{number}"),
                    tensors.get(f"factor.{number}"),
                    None if bias is None else bias[first : first + rows],
                    rows,
                    kind,
                    field_bits(element),
                    middle_of(element),
                    meta[f"chunk.{number}"],
                    meta[f"per_group.{number}"],
                    meta[f"rows_per_scale.{number}"],
                )
            )
            first += rows
        y = results[0] if len(results) == 1 else torch.cat(results, dim=1)
        return y.view(*x.shape[:-1], prepared.problem.out_features)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the values `[N, K]`, computed in float32 by ordinary operators."""
        import torch

        from quantplug_triton.unpack import canonical

        return torch.cat([weight.dequantize(dtype) for weight in canonical(prepared)])

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments where nothing was rounded on the way in."""
        from quantplug_triton.unpack import unprepare

        return unprepare(prepared)


@cache
def _probe() -> Rejected | None:
    """Return why the kernel cannot be used on this machine, or None."""
    try:
        import triton
    except ImportError as error:
        return Rejected("dependency", f"triton cannot be imported: {error}", "pip install triton")
    import torch

    from quantplug_triton.launch import linear

    codes = (torch.arange(64 * 64, device="cuda") % 7).to(torch.uint8).view(1, 64, 64)
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    x[0, 3], x[0, 40], x[1, 63] = 1, -1, 2
    scales = torch.full((1, 64), 0.5, dtype=torch.float16, device="cuda")
    try:
        y = linear(x, codes, scales, None, None, None, None, 64, 1, 8, 3, 64, 1, 1)
    except (RuntimeError, OSError, ValueError) as error:
        return Rejected("probe", f"Triton {triton.__version__} cannot build or run it: {error}", "install a C compiler")
    # Small integers, which bfloat16 holds exactly.
    wanted = x.to(torch.float32) @ (codes[0].to(torch.float32) - 3) / 2
    if not torch.equal(y.to(torch.float32), wanted):
        return Rejected("probe", f"a small product is wrong with Triton {triton.__version__}", "report it")
    return None
