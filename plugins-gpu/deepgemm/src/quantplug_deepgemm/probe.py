"""
Whether the package is here, and its compiler works.
"""

from __future__ import annotations

from functools import cache

from quantplug.kernel import Rejected

_INSTALL = "pip install sgl-deep-gemm"
_COMPILER = "have nvcc 12.3 or later at CUDA_HOME, or set DG_JIT_USE_NVRTC=1"


@cache
def probe() -> Rejected | None:
    """Return why the kernel cannot be used on this machine, or None; the first on a machine compiles for seconds."""
    try:
        import deep_gemm
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        # Where it finds no CUDA toolkit, it asserts that there is one, and says no more.
        return Rejected("dependency", f"deep_gemm cannot be imported: {error or 'no CUDA toolkit'}", _INSTALL)
    version = str(getattr(deep_gemm, "__version__", ""))
    if not version.startswith("0.1."):
        return Rejected("dependency", f"deep_gemm is {version or 'of an unknown version'}", f"{_INSTALL}==0.1.0")
    try:
        import triton  # noqa: F401  # nothing of it is needed here
    except ImportError as error:
        return Rejected("dependency", f"triton cannot be imported: {error}", "pip install triton")
    return _try_product("cuda")


def _try_product(device: str) -> Rejected | None:
    """Return what is wrong with a small product, or None."""
    import torch

    from quantplug_deepgemm.product import linear

    x = torch.zeros(3, 512, dtype=torch.bfloat16, device=device)
    x[0, 3], x[1, 300], x[2, 511] = 448, -448, 448
    codes = ((torch.arange(32 * 512, device=device) % 15).view(32, 512) - 7).to(torch.float8_e4m3fn)
    try:
        y = linear(x, codes, torch.full((4, 1), 0.5, device=device), None, 32)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        return Rejected("probe", f"DeepGEMM cannot multiply: {reason}", _COMPILER)
    # The largest element is its own scale's largest code, so that each product of a row is one code of the weight.
    wanted = x.to(torch.float32) @ codes.to(torch.float32).t() / 2
    if not torch.allclose(y.to(torch.float32), wanted, rtol=2**-8, atol=0):
        return Rejected("probe", "a small product of DeepGEMM is wrong", "report it")
    return None
