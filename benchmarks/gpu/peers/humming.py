"""
The package humming-kernels by itself, for linear layers, with its own choice of kernels.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.contenders import Contender, Held
from benchmarks.gpu.formats import FORMATS
from quantplug.spec import ElementType, PerBlock, PerGroup, PerTensor

if TYPE_CHECKING:
    from benchmarks.gpu.cases import LinearCase
    from quantplug.weight import Weight


class Humming(Contender):
    """humming as its own layer calls it; it adds up parts of long sums in bfloat16."""

    name = "humming"
    slow_to_compile = True

    def refuses(self, case: LinearCase) -> str:
        """Take everything, where it is installed; a stored scale of x is not tried."""
        if find_spec("humming") is None:
            return "not installed"
        return "a stored scale of x is not tried" if case.of_format.activation.endswith("static") else ""

    def quantizes_x(self, case: LinearCase) -> bool:
        """Where the format permits it."""
        return case.of_format.quantizes_x

    def prepare(self, case: LinearCase) -> Held:
        """Let humming transform what its own schema stores."""
        from humming.transform import transform_humming_tensors

        stored = as_stored(case.weight(CUDA))
        made = transform_humming_tensors(described(case.format, case.n, case.k), stored)
        return Held({**made, "locks": locks()}, {})

    def call(self, given: torch.Tensor, held: Held, case: LinearCase) -> torch.Tensor:
        """Quantize x where that is part of it, and multiply."""
        from humming.forward import humming_forward

        layer = described(case.format, case.n, case.k)
        tuning = tuned(case.format, case.n, case.k, 0, given.shape[0])
        y: torch.Tensor = humming_forward(layer, given, tuning_config=tuning, **held.tensors)
        return y


def as_stored(weight: Weight) -> dict[str, torch.Tensor]:
    """Return a weight's words and scales as humming's schema has them."""
    scales = weight.scales
    if weight.spec.element is ElementType.INT4:
        from humming import ops

        words = ops.pack_weight(weight.codes.to(torch.int32) + 8, 4)
    else:
        words = weight.codes.view(torch.int32)
    if weight.spec.scale_dtype != "float8_e8m0fnu" and scales.shape[0] == weight.codes.shape[0]:
        scales = scales.to(torch.bfloat16)
    return {"weight": words, "weight_scale": scales}


def locks() -> torch.Tensor:
    """Return what its kernels count with who has added a part."""
    return torch.zeros(2048, dtype=torch.int32, device=CUDA)


@cache
def described(format_name: str, n: int, k: int, experts: int = 0) -> Any:
    """Return humming's description of a layer, or of one product of all experts."""
    from humming import dtypes
    from humming.config import LayerConfig

    kind = FORMATS[format_name]
    spec, bfloat16 = kind.weight, dtypes.bfloat16
    granularity = spec.granularity
    block = granularity.k if isinstance(granularity, PerBlock) else 0
    group = granularity.size if isinstance(granularity, PerGroup) else block
    scale = dtypes.float8e8m0 if spec.scale_dtype == "float8_e8m0fnu" else bfloat16
    return LayerConfig(
        shape_n=n,
        shape_k=k,
        num_experts=experts,
        b_dtype=dtypes.uint4 if spec.element is ElementType.INT4 else dtypes.float8e4m3,
        a_dtype=dtypes.float8e4m3 if kind.quantizes_x else bfloat16,
        c_dtype=bfloat16,
        bs_dtype=dtypes.float32 if block or isinstance(granularity, PerTensor) else scale,
        weight_scale_group_size=group,
        weight_scale_group_size_n=block,
        input_scale_group_size=block,
    )


@cache
def tuned(format_name: str, n: int, k: int, experts: int, rows: int, *, waits: bool = False) -> str:
    """
    Return humming's own choice of a kernel.

    Args:
        format_name: of the weights.
        n: outputs.
        k: inputs.
        experts: E, whose rows are indexed; 0 for a linear layer.
        rows: of x, or choices of all rows.
        waits: whether it must not begin before the launch ahead of it has ended.
    """
    from humming.tune import get_heuristics_config

    layer, gemm = described(format_name, n, k, experts), "indexed" if experts else "dense"
    kernel = dict(get_heuristics_config(layer, shape_m=rows, gemm_type=gemm, device=0))
    return json.dumps(kernel | ({"use_pdl": False} if waits else {}))
