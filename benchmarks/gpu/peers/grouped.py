"""
What torch itself has for experts: its grouped products, on rows that were gathered in the order of experts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.contenders import Contender, Held

if TYPE_CHECKING:
    from benchmarks.gpu.experts import ExpertCase, Routed


class _Grouped(Contender):
    """Choices put in order, rows gathered, first product, SiLU of gate times up, second product, weighted sum."""

    kind = "experts"
    quantizes = False

    def refuses(self, case: ExpertCase) -> str:
        """Refuse where nothing is there to put choices in order."""
        return "" if find_spec("triton") is not None else "Triton puts choices in order, and is not installed"

    def quantizes_x(self, case: ExpertCase) -> bool:
        """As the class says."""
        return self.quantizes

    def call(self, given: Routed, held: Held, case: ExpertCase) -> torch.Tensor:
        """Run the layer."""
        from benchmarks.gpu.peers.launch import aligned, between, combined, gathered

        order = aligned(given.ids, case.sizes.experts, 1)
        x, scales = gathered(given.x, order.choices, case.sizes.top_k, quantize=self.quantizes)
        gate_up = self._product(x, scales, held, "13", order.ends)
        hidden, scales = between(gate_up, quantize=self.quantizes)
        out = self._product(hidden, scales, held, "2", order.ends)
        return combined(out, given.weights, order.places)

    def _product(
        self, x: torch.Tensor, scales: torch.Tensor | None, held: Held, product: str, ends: torch.Tensor
    ) -> torch.Tensor:
        """Multiply rows with their experts' weights; each expert's end at `ends`."""
        raise NotImplementedError


class Bfloat16Grouped(_Grouped):
    """The grouped product in bfloat16, experts dequantized once for all: two to four times the memory."""

    name = "bf16 grouped"
    role = "reference"

    def prepare(self, case: ExpertCase) -> Held:
        """Dequantize."""
        experts, _, hidden, intermediate = case.sizes
        w13 = torch.empty(experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device=CUDA)
        w2 = torch.empty(experts, hidden, intermediate, dtype=torch.bfloat16, device=CUDA)
        for number, expert in enumerate(case.all_experts(CUDA)):
            w13[number] = torch.cat([weight.dequantize(torch.bfloat16) for weight in expert.w13])
            w2[number] = expert.w2.dequantize(torch.bfloat16)
        return Held({"13": w13, "2": w2}, {})

    def _product(
        self, x: torch.Tensor, scales: torch.Tensor | None, held: Held, product: str, ends: torch.Tensor
    ) -> torch.Tensor:
        return torch._grouped_mm(x, held.tensors[product].transpose(1, 2), offs=ends)


class ScaledGrouped(_Grouped):
    """The grouped product in FP8, a scale for each row and each output, with fast accumulation."""

    name = "torch fp8 grouped"
    quantizes = True

    def concerns(self, case: ExpertCase) -> bool:
        """FP8 on both sides, one scale a row."""
        return case.format == "fp8 channel w8a8"

    def prepare(self, case: ExpertCase) -> Held:
        """Keep codes and scales."""
        experts, _, hidden, intermediate = case.sizes
        tensors: dict[str, torch.Tensor] = {}
        for product, rows, inputs in (("13", 2 * intermediate, hidden), ("2", hidden, intermediate)):
            tensors[product] = torch.empty(experts, rows, inputs, dtype=torch.float8_e4m3fn, device=CUDA)
            tensors[f"scales.{product}"] = torch.empty(experts, rows, dtype=torch.float32, device=CUDA)
        for number, expert in enumerate(case.all_experts(CUDA)):
            for product, parts in (("13", expert.w13), ("2", (expert.w2,))):
                tensors[product][number] = torch.cat([part.codes for part in parts])
                tensors[f"scales.{product}"][number] = torch.cat([part.scales for part in parts])[:, 0]
        return Held(tensors, {})

    def _product(
        self, x: torch.Tensor, scales: torch.Tensor | None, held: Held, product: str, ends: torch.Tensor
    ) -> torch.Tensor:
        if scales is None:
            raise ValueError("rows were not quantized")
        return torch._scaled_grouped_mm(
            x, held.tensors[product].transpose(1, 2), scales, held.tensors[f"scales.{product}"],
            offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
