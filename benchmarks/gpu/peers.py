"""
Peers: what somebody has today without this project. Each is left out, with the reason, where it is not installed.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import FORMATS, Case
from benchmarks.gpu.contenders import Contender, Held
from quantplug.spec import ElementType, PerTensor

if TYPE_CHECKING:
    from collections.abc import Callable

_CUDA = torch.device("cuda")


class Bfloat16(Contender):
    """cuBLAS in bfloat16, the layer dequantized once for all."""

    name = "bf16 F.linear"

    def refuses(self, case: Case) -> str:
        """Never."""
        return ""

    def prepare(self, case: Case) -> Held:
        """Dequantize."""
        return Held({"weight": case.weight(_CUDA).dequantize(torch.bfloat16)}, {})

    def call(self, x: torch.Tensor, held: Held, case: Case) -> torch.Tensor:
        """Multiply."""
        return torch.nn.functional.linear(x, held.tensors["weight"])


class TinyGemm(Contender):
    """torch's own int4 product, which torchao uses; its scales are bfloat16."""

    name = "torch int4"

    def concerns(self, case: Case) -> bool:
        """4-bit integers only."""
        return FORMATS[case.format].weight.element is ElementType.INT4

    def refuses(self, case: Case) -> str:
        """Never."""
        return ""

    def prepare(self, case: Case) -> Held:
        """Pack codes two to a byte, scales and zeros in pairs."""
        weight = case.weight(_CUDA)
        codes = (weight.codes.to(torch.int32) + 8).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        scales = weight.scales.t().to(torch.bfloat16)
        pairs = torch.stack([scales, torch.zeros_like(scales)], dim=2).contiguous()
        return Held({"packed": packed, "pairs": pairs}, {})

    def call(self, x: torch.Tensor, held: Held, case: Case) -> torch.Tensor:
        """Multiply."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, held.tensors["packed"], 128, held.tensors["pairs"])
        return y

    def rows(self, asked: tuple[int, ...], case: Case) -> tuple[int, ...]:
        """Leave out many rows: its time grows with every 16 of them."""
        return tuple(rows for rows in asked if rows <= 64)


class ScaledProduct(Contender):
    """
    torch's scaled product in FP8 as engines call it: with fast accumulation where it exists, whose error has no bound.

    Args:
        given: whether x is quantized outside of the time that is measured.
    """

    def __init__(self, *, given: bool) -> None:
        self.informative = given
        self.name = "torch fp8, x given" if given else "torch fp8"

    def concerns(self, case: Case) -> bool:
        """FP8 on both sides only."""
        return FORMATS[case.format].quantizes_x

    def quantizes_x(self, case: Case) -> bool:
        """Always."""
        return True

    def refuses(self, case: Case) -> str:
        """Refuse where nothing is there to quantize x."""
        return "" if find_spec("triton") is not None else "Triton quantizes x, and is not installed"

    def prepare(self, case: Case) -> Held:
        """Keep codes, and scales as torch takes them."""
        weight = case.weight(_CUDA)
        scales = weight.scales.to(torch.float32)
        return Held({"codes": weight.codes, "scales": scales if scales.shape[0] * 128 == case.n else scales.t()}, {})

    def ready(self, x: torch.Tensor, case: Case) -> Any:
        """Quantize x where that is not measured."""
        return self._quantize(x, case) if self.informative else x

    def call(self, x: Any, held: Held, case: Case) -> torch.Tensor:
        """Quantize x by one launch, and multiply."""
        codes, scales, rows = x if self.informative else self._quantize(x, case)
        blocks = scales.dim() == 2 and scales.shape[1] > 1
        weight_scales = held.tensors["scales"].t() if blocks else held.tensors["scales"]
        y = torch._scaled_mm(
            codes, held.tensors["codes"].t(), scales, weight_scales, out_dtype=torch.bfloat16, use_fast_accum=not blocks
        )
        return y[:rows]

    def _quantize(self, x: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor, int]:
        from quantplug_cublas import launch

        permission, dtype = FORMATS[case.format].activation, torch.float8_e4m3fn
        if "group" in permission:
            return *launch.by_groups(x, -(-x.shape[0] // 4) * 4, x.shape[1], dtype), x.shape[0]
        if "token" in permission:
            return *launch.by_tokens(x, x.shape[1], dtype), x.shape[0]
        return launch.by_scale(x, _x_scale(case), x.shape[1], dtype), _x_scale(case), x.shape[0]


class Humming(Contender):
    """The package humming-kernels with its own choice of kernels, which add up parts of sums in bfloat16."""

    name = "humming"

    def refuses(self, case: Case) -> str:
        """Take everything, where it is installed; a stored scale of x is not tried."""
        if find_spec("humming") is None:
            return "not installed"
        return "a stored scale of x is not tried" if FORMATS[case.format].activation.endswith("static") else ""

    def quantizes_x(self, case: Case) -> bool:
        """Where the format permits it."""
        return FORMATS[case.format].quantizes_x

    def prepare(self, case: Case) -> Held:
        """Let humming transform what its own schema stores."""
        from humming.transform import transform_humming_tensors

        weight = case.weight(_CUDA)
        if weight.spec.element is ElementType.INT4:
            from humming import ops

            words = ops.pack_weight(weight.codes.to(torch.int32) + 8, 4)
        else:
            words = weight.codes.view(torch.int32)
        scales = weight.scales
        if weight.spec.scale_dtype != "float8_e8m0fnu" and scales.shape[0] == case.n:
            scales = scales.to(torch.bfloat16)
        made = transform_humming_tensors(_humming_layer(case), {"weight": words, "weight_scale": scales})
        locks = torch.zeros(2048, dtype=torch.int32, device=_CUDA)
        return Held({**made, "locks": locks}, {})

    def call(self, x: torch.Tensor, held: Held, case: Case) -> torch.Tensor:
        """Quantize x where that is part of it, and multiply."""
        from humming.forward import humming_forward

        tuning = _humming_choice(case, x.shape[0])
        y: torch.Tensor = humming_forward(_humming_layer(case), x, tuning_config=tuning, **held.tensors)
        return y


@cache
def _x_scale(case: Case) -> torch.Tensor:
    params = case.activation()
    if params is None or params.scale is None:
        raise ValueError(f"{case} stores no scale of x")
    return params.scale.reshape(1).to(_CUDA)


@cache
def _humming_layer(case: Case) -> Any:
    from humming import dtypes
    from humming.config import LayerConfig

    kind = FORMATS[case.format]
    spec, bfloat16 = kind.weight, dtypes.bfloat16
    group = int(kind.activation.partition("group")[2].partition("/")[0] or 0)
    groups = {"int4 g128": 128, "mxfp8 weight-only": 32, "fp8 block w8a8": 128}.get(case.format, 0)
    scale = dtypes.float8e8m0 if spec.scale_dtype == "float8_e8m0fnu" else bfloat16
    return LayerConfig(
        shape_n=case.n,
        shape_k=case.k,
        b_dtype=dtypes.uint4 if spec.element is ElementType.INT4 else dtypes.float8e4m3,
        a_dtype=dtypes.float8e4m3 if kind.quantizes_x else bfloat16,
        c_dtype=bfloat16,
        bs_dtype=dtypes.float32 if group or isinstance(spec.granularity, PerTensor) else scale,
        weight_scale_group_size=groups,
        weight_scale_group_size_n=128 if group else 0,
        input_scale_group_size=group,
    )


@cache
def _humming_choice(case: Case, rows: int) -> str:
    from humming.tune import get_heuristics_config

    return json.dumps(get_heuristics_config(_humming_layer(case), shape_m=rows, device=0))


PEERS: tuple[Callable[[], Contender], ...] = (
    Bfloat16,
    TinyGemm,
    lambda: ScaledProduct(given=False),
    lambda: ScaledProduct(given=True),
    Humming,
)
"""How each peer is made."""
