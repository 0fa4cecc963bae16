"""
The package humming-kernels by itself, for experts, as an engine calls it: both products read their rows by index.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.contenders import Contender, Held
from benchmarks.gpu.peers.humming import as_stored, described, locks, tuned

if TYPE_CHECKING:
    from benchmarks.gpu.experts import ExpertCase, Routed

_INDEXED = json.dumps({"gemm_type": "indexed"})
_SILU_TIMES_UP = "a / (1.0f + __expf(-a)) * b"


class HummingExperts(Contender):
    """
    Choices put in order, first product, SiLU of gate times up, second product, weighted sum.

    Products and the function between them (with its quantizing, where x is quantized) are humming's, with its own
    choice of kernels; it has neither the order of choices nor the sum, which are launches of ours.
    """

    name = "humming experts"
    kind = "experts"
    slow_to_compile = True

    def refuses(self, case: ExpertCase) -> str:
        """Take everything, where it is installed."""
        return "" if find_spec("humming") is not None else "not installed"

    def quantizes_x(self, case: ExpertCase) -> bool:
        """Where the format permits it."""
        return case.of_format.quantizes_x

    def prepare(self, case: ExpertCase) -> Held:
        """Let humming transform what its own schema stores, all experts at once."""
        from humming.transform import transform_humming_tensors

        tensors = {"locks": locks()}
        for product, layer in zip(("13", "2"), _layers(case), strict=True):
            stacks: dict[str, torch.Tensor] = {}
            for number, expert in enumerate(case.all_experts(CUDA)):
                parts = [as_stored(weight) for weight in (expert.w13 if product == "13" else (expert.w2,))]
                for name in parts[0]:
                    whole = torch.cat([part[name] for part in parts])
                    if name not in stacks:
                        stacks[name] = whole.new_empty((case.sizes.experts, *whole.shape))
                    stacks[name][number] = whole
            made = transform_humming_tensors(layer, stacks)
            tensors |= {f"{name}.{product}": tensor for name, tensor in made.items()}
        return Held(tensors, {})

    def call(self, given: Routed, held: Held, case: ExpertCase) -> torch.Tensor:
        """Run the layer."""
        from humming.forward import humming_forward, may_process_input

        from benchmarks.gpu.peers.launch import aligned, combined

        experts, top_k, hidden, intermediate = case.sizes
        choices = given.ids.numel()
        first, second = _layers(case)
        # It reads the order of choices at once, which a kernel that is launched early would find unwritten.
        tuned13 = tuned(case.format, 2 * intermediate, hidden, experts, choices, waits=True)
        tuned2 = tuned(case.format, hidden, intermediate, experts, choices)
        block = json.loads(tuned13)["block_shape"][0]
        if json.loads(tuned2)["block_shape"][0] != block:
            raise NotImplementedError("humming would take other blocks of rows for the second product")
        order = aligned(given.ids, experts, block)
        indexed = {
            "sorted_ids": order.choices, "expert_ids": order.owners, "num_tokens_padded": order.total,
            "compute_config": _INDEXED, "locks": held.tensors["locks"],
        }  # fmt: skip
        gate_up = humming_forward(
            first, given.x, tuning_config=tuned13, top_k=top_k, **_of(held, "13"), **indexed
        )  # fmt: skip
        between, _, scales = may_process_input(
            second, gate_up, activation_type="binary_split", activation_impl=_SILU_TIMES_UP
        )
        out = humming_forward(
            second, between, input_scale=scales, tuning_config=tuned2, top_k=1, **_of(held, "2"), **indexed
        )
        return combined(out, given.weights)


def _layers(case: ExpertCase) -> tuple[object, object]:
    experts, _, hidden, intermediate = case.sizes
    return (
        described(case.format, 2 * intermediate, hidden, experts),
        described(case.format, hidden, intermediate, experts),
    )


def _of(held: Held, product: str) -> dict[str, torch.Tensor]:
    ending = f".{product}"
    return {name.removesuffix(ending): tensor for name, tensor in held.tensors.items() if name.endswith(ending)}
