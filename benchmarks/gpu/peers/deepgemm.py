"""
DeepGEMM (the package sgl-deep-gemm, a fork that is on PyPI): FP8 times FP8, weights in blocks of 128 x 128.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.contenders import Contender, Held
from benchmarks.gpu.peers.dense import quantize

if TYPE_CHECKING:
    from benchmarks.gpu.cases import LinearCase


class DeepGemm(Contender):
    """DeepGEMM's product; x is quantized by our launch, which writes scales in the layout that it reads."""

    name = "DeepGEMM"
    slow_to_compile = True

    def concerns(self, case: LinearCase) -> bool:
        """Blocks only."""
        return case.format == "fp8 block w8a8"

    def quantizes_x(self, case: LinearCase) -> bool:
        """Always."""
        return True

    def refuses(self, case: LinearCase) -> str:
        """Refuse where it is not installed."""
        return "" if find_spec("deep_gemm") is not None else "not installed"

    def prepare(self, case: LinearCase) -> Held:
        """Keep codes and scales."""
        weight = case.weight(CUDA)
        return Held({"codes": weight.codes, "scales": weight.scales.to(torch.float32)}, {})

    def call(self, given: torch.Tensor, held: Held, case: LinearCase) -> torch.Tensor:
        """Quantize x by one launch, and multiply."""
        import deep_gemm

        codes, scales, rows = quantize(given, case)
        y = torch.empty(rows, case.n, dtype=torch.bfloat16, device=given.device)
        # Its default compiles once for all layers, and takes three times as long where registers do not suffice then.
        deep_gemm.fp8_gemm_nt(
            (codes[:rows], scales[:rows]), (held.tensors["codes"], held.tensors["scales"]), y, compiled_dims="nk"
        )
        return y
