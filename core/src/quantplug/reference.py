"""
The kernel that serves every format on every platform: dequantize, then multiply, in float32.

Slow, obvious and right. It has the lowest priority; a plan that uses it says so in a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cost, LinearKernel, Rejected, Traits, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight

_DTYPES = ("bfloat16", "float16", "float32")
_TENSORS = ("codes", "scales", "zeros", "g_idx", "global_scale")

# Dequantizing with one torch operator after another moves about 40 bytes per weight, the product about 4 more; at
# 10 GB/s (a slow machine's memory) that is 0.0044 us per weight. Only its order against real kernels matters.
_US_PER_WEIGHT = 0.0044
_US_PER_WEIGHT_AND_ROW = 0.0001


class ReferenceKernel(LinearKernel):
    """
    `y = x W^T + b` with W dequantized to float32 at every call and one rounding, of y, to the dtype of x.

    It never quantizes x, even where the file permits it.
    """

    name = "reference"
    layout_id = "canonical"
    traits = Traits(graph_safe=False, differentiable=True, tangents=True, fallback=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept every problem in a float dtype; weights stay one byte per code."""
        if problem.dtype not in _DTYPES:
            return Rejected("dtype", f"activation dtype {problem.dtype}", f"use one of {', '.join(_DTYPES)}")
        weights = problem.in_features * problem.out_features
        spare_bits = sum(s.out_features * (8 - s.weight.element.bits) for s in problem.segments)
        return Accepted(
            Cost(fixed_us=20 + weights * _US_PER_WEIGHT, row_us=weights * _US_PER_WEIGHT_AND_ROW),
            extra_bytes=spare_bits * problem.in_features // 8,
            notes=("dequantizes the whole layer at every call",),
        )

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Keep the canonical tensors as they are, without a copy where they already lie on the device."""
        from quantplug.weight import Prepared

        tensors: dict[str, torch.Tensor] = {}
        for number, weight in enumerate(segments):
            for name in _TENSORS:
                tensor = getattr(weight, name)
                if tensor is not None:
                    tensors[f"{name}.{number}"] = tensor.to(device)
        return Prepared(self.layout_id, problem, tensors).into(out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply in float32 and round once."""
        import torch

        values = self.dequantize(prepared, torch.float32)
        y = torch.nn.functional.linear(x.to(torch.float32), values, None if bias is None else bias.to(torch.float32))
        return y.to(x.dtype)

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Return the values `[N, K]` of all segments, one below the other."""
        import torch

        return torch.cat([weight.dequantize(dtype) for weight in self.unprepare(prepared)])

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Return the canonical segments; they are what is held."""
        from quantplug.weight import Weight

        return tuple(
            Weight(
                codes=prepared.tensors[f"codes.{number}"],
                scales=prepared.tensors[f"scales.{number}"],
                spec=segment.weight,
                zeros=prepared.tensors.get(f"zeros.{number}"),
                g_idx=prepared.tensors.get(f"g_idx.{number}"),
                global_scale=prepared.tensors.get(f"global_scale.{number}"),
            )
            for number, segment in enumerate(prepared.problem.segments)
        )
