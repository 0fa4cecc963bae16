"""
Many rows through torch's own dense product: any kernel's weights dequantized once per call, then multiplied.

What a kernel gains by reading few bytes counts for few rows; for many, the vendor's dense product is hard to beat. Such
a kernel shares the layout of the one it rests on, so that a plan can use either by the number of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.asking import ask
from quantplug.kernel import Accepted, Cast, Cost, LinearKernel, Rejected, Traits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from quantplug.kernel import Verdict
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight

SUFFIX = ".dense"

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_OPERATORS_US, _OPERATORS_BYTES = 60.0, 40
"""
What dequantizing with one torch operator after another takes: about a dozen calls, and bytes that it moves for each
weight, as in the `reference` kernel.
"""

# A call, bytes per microsecond of memory, and products of a weight and a row per microsecond: the size of what machines
# of a kind reach, to be corrected by measuring. By compute capability on GPUs.
_CPU_CALL_US, _CALL_US = 12.0, 8.0
_CPU_BYTES = 1.0e4
_CPU_PRODUCTS = {"bfloat16": 1.95e5, "float16": 3.0e4, "float32": 6.5e4}
_BYTES = {"7.5": 3.0e5, "8.0": 1.6e6, "8.6": 7.0e5, "8.9": 8.0e5, "9.0": 3.0e6, "10.0": 7.0e6, "12.0": 1.5e6}
_PRODUCTS = {"7.5": 2.5e7, "8.0": 1.2e8, "8.6": 6.0e7, "8.9": 8.0e7, "9.0": 3.3e8, "10.0": 7.0e8, "12.0": 1.0e8}
_OTHER_BYTES, _OTHER_PRODUCTS = 1.0e6, 5.0e7
_FLOAT32_SHARE = 1 / 12
"""Of what a matrix unit does in 16-bit floats: float32 runs on the ordinary ones."""


class DenseProduct(LinearKernel):
    """
    `y = x W^T + b` by `torch.nn.functional.linear`, with W dequantized into the dtype of x at every call.

    Args:
        kernel: whose weights they are; it has a `dequantize`.
    """

    __slots__ = ("kernel", "layout_id", "name", "traits")

    def __init__(self, kernel: LinearKernel) -> None:
        self.kernel = kernel
        self.name = kernel.name + SUFFIX  # type: ignore[misc]  # of the instance: one class serves all kernels
        self.layout_id = kernel.layout_id  # type: ignore[misc]  # as above
        self.traits = Traits(  # type: ignore[misc]  # as above
            uniform_segments=kernel.traits.uniform_segments,
            graph_safe=kernel.traits.dequantize_graph_safe,
            deterministic=kernel.traits.deterministic,
            differentiable=True,
            tangents=True,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenseProduct) and other.kernel == self.kernel

    def __hash__(self) -> int:
        return hash((DenseProduct, self.kernel))

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept what the kernel accepts, but where it quantizes x, or holds as many bytes as a dense layer."""
        verdict = ask(self.kernel, problem, platform)
        if isinstance(verdict, Rejected):
            return verdict
        if problem.dtype not in _DTYPE_BYTES:
            return Rejected("dtype", f"activation dtype {problem.dtype}", f"use one of {', '.join(_DTYPE_BYTES)}")
        if verdict.quantizes_x and problem.activation is not None:
            permitted = problem.activation.describe()
            return Rejected("activation", f"{self.kernel.name} takes x as {permitted}, a dense product as it is")
        weights = problem.in_features * problem.out_features
        dense = weights * _DTYPE_BYTES[problem.dtype]
        held = problem.stored_bytes + verdict.extra_bytes
        if held >= dense:
            size = f"{problem.out_features} x {problem.in_features}"
            return Rejected("shape", f"{self.kernel.name} holds {size} in {held} bytes, a dense layer in {dense}")
        rates = _rates(problem.dtype, platform)
        dequantize_us = verdict.dequantize_us
        if dequantize_us is None:
            dequantize_us = _OPERATORS_US + weights * _OPERATORS_BYTES / rates.bytes_per_us
        casts = [cast for cast in verdict.casts if cast.what in ("scales", "zeros")]
        if problem.dtype != "float32":
            casts.append(Cast("weights", problem.dtype))
            if platform.kind != "cpu":
                # torch lets the vendor's product add up parts of a sum in the dtype of x.
                casts.append(Cast("partials", problem.dtype))
        return Accepted(
            Cost(rates.call_us + dequantize_us + dense / rates.bytes_per_us, weights / rates.products_per_us),
            casts=tuple(casts),
            extra_bytes=verdict.extra_bytes,
            notes=(f"dequantizes the whole layer at every call ({dense / 1e6:.1f} MB that live as long as it)",),
        )

    def probe(self, platform: Platform) -> Rejected | None:
        """Refuse where the kernel does."""
        return self.kernel.probe(platform)

    def prepare(
        self,
        problem: LinearProblem,
        segments: Sequence[Weight],
        activation: Sequence[ActivationParams | None],
        device: torch.device,
        out: Prepared | None = None,
    ) -> Prepared:
        """Leave it to the kernel."""
        return self.kernel.prepare(problem, segments, activation, device, out)

    def apply(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Dequantize, then multiply."""
        from torch.nn.functional import linear

        values = self.kernel.dequantize(prepared, x.dtype)
        # As rows of one matrix, so that the bias is part of the product: otherwise it is added to what was rounded.
        y = linear(x.reshape(x.numel() // x.shape[-1], x.shape[-1]), values, bias)
        return y.view(*x.shape[:-1], y.shape[1])

    def dequantize(self, prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
        """Leave it to the kernel."""
        return self.kernel.dequantize(prepared, dtype)

    def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
        """Leave it to the kernel."""
        return self.kernel.unprepare(prepared)


def dequantizes(kernel: LinearKernel) -> bool:
    """Return whether a kernel has a `dequantize`, which is optional."""
    return type(kernel).dequantize is not LinearKernel.dequantize


def offers_dense(kernel: LinearKernel) -> bool:
    """Return whether a dense product can rest on a kernel: it dequantizes, and is chosen without being asked for."""
    return dequantizes(kernel) and not kernel.traits.fallback and not kernel.traits.by_request


class _Rates:
    """What a platform does in a dtype, roughly: microseconds of a call, bytes and products per microsecond."""

    __slots__ = ("bytes_per_us", "call_us", "products_per_us")

    def __init__(self, call_us: float, bytes_per_us: float, products_per_us: float) -> None:
        self.call_us = call_us
        self.bytes_per_us = bytes_per_us
        self.products_per_us = products_per_us


def _rates(dtype: str, platform: Platform) -> _Rates:
    if platform.kind == "cpu":
        return _Rates(_CPU_CALL_US, _CPU_BYTES, _CPU_PRODUCTS[dtype])
    share = _FLOAT32_SHARE if dtype == "float32" else 1.0
    products = _PRODUCTS.get(platform.arch, _OTHER_PRODUCTS)
    return _Rates(_CALL_US, _BYTES.get(platform.arch, _OTHER_BYTES), products * share)
