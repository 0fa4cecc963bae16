"""
A stand-in for the package deep_gemm where there is no GPU: the function that the plugin calls, in plain torch.

It takes what DeepGEMM takes on Hopper, and complains where DeepGEMM would, or would copy.
"""

from __future__ import annotations

from types import ModuleType

import torch


def fp8_gemm_nt(a, b, d, c=None, recipe=None, compiled_dims="", disable_ue8m0_cast=False):
    """`d [M, N] = a [M, K] b [N, K]^T`, scales for each 128 inputs of a and each 128 x 128 of b."""
    assert (c, recipe, disable_ue8m0_cast) == (None, None, False)
    assert set(compiled_dims) <= set("mnk")
    (x, x_scales), (weight, scales) = a, b
    (m, k), n = x.shape, weight.shape[0]
    assert x.dtype == weight.dtype == torch.float8_e4m3fn
    assert x_scales.dtype == scales.dtype == torch.float32
    assert d.dtype == torch.bfloat16
    assert d.shape == (m, n)
    assert weight.shape == (n, k)
    assert all(each.is_contiguous() for each in (x, weight, d))
    assert k % 16 == n % 8 == 0
    groups = -(-k // 128)
    assert x_scales.shape == (m, groups)
    assert x_scales.stride() == (1, -(-m // 4) * 4)
    assert scales.shape == (-(-n // 128), groups)
    assert scales.is_contiguous()
    spread = scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    left = x.double() * x_scales.double().repeat_interleave(128, 1)[:, :k]
    d.copy_(left @ (weight.double() * spread.double()).t())


def module() -> ModuleType:
    """Return what `import deep_gemm` would."""
    made = ModuleType("deep_gemm")
    made.__version__ = "0.1.0"
    made.fp8_gemm_nt = fp8_gemm_nt
    return made
