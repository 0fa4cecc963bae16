"""
The operator of torch that runs a mixture of experts: routing, humming's indexed product twice, and what lies between.

Nothing depends on what the router says, so that a captured graph follows it: humming reads from the device how many
blocks of rows there are. What a call needs beside weights is its own, humming's counters included.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from quantplug_humming.choice import Choice, choose
from quantplug_humming.entering import Activation, Entering, activated, quantized
from quantplug_humming.expertdevice import combine
from quantplug_humming.form import Form
from quantplug_humming.prepare import NAMES, layer_config
from quantplug_humming.product import widened
from quantplug_humming.routing import Blocks, Choices, to_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.expertweights import PreparedExperts

_INDEXED = json.dumps({"gemm_type": "indexed"})
_COLUMNS = 512


def apply(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
    *,
    promoted: bool = False,
) -> torch.Tensor:
    """Return y `[M, H]`; `promoted` sums of products in float8_e4m3fn move to float32 every 128 inputs."""
    problem, tensors, meta, f = prepared.problem, prepared.tensors, prepared.meta, prepared.problem.function
    given = [tensors.get(f"{product}.{name}") for product in ("w13", "w2") for name in (*NAMES, "bias")]
    forms = [Form(*(meta[f"{product}.{name}"] for name in Form._fields)) for product in ("w13", "w2")]
    facts = [list(form._replace(promoted=int(promoted))) for form in forms]
    return experts(
        x, topk_weights, topk_ids, expert_map, *given, *facts, problem.experts, problem.router_weight_on_input,
        f.name, f.gated, f.limit, f.alpha, f.up_offset,
    )  # fmt: skip


class _Product(NamedTuple):
    """One of the two products: humming's tensors of its weight, and its form."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    form: Form

    def choose(self, choices: Choices, device: torch.device) -> Choice:
        """Return humming's choice of a kernel."""
        return choose(self.form, self.bias is not None, choices.experts, choices.total, device.index or 0)

    def multiply(self, x: Entering, choice: Choice, experts: int, blocks: Blocks, top_k: int) -> torch.Tensor:
        """Return the product of each choice, `[M * T, N filled up to 8]`; x has a row for so many choices."""
        from humming.ops import humming_gemm

        config = layer_config(self.form, bias=self.bias is not None, experts=experts)
        product: torch.Tensor = humming_gemm(
            layer_config=config.to_str(),
            compute_config=_INDEXED,
            tuning_config=choice.tuning,
            inputs=widened(x.values, config.shape_k - config.pad_shape_k),
            input_scale=x.scales,
            weight=self.weight,
            weight_scale=self.scales,
            zero_point=self.zeros,
            bias=self.bias,
            sorted_ids=blocks.order,
            expert_ids=blocks.owners,
            num_tokens_padded=blocks.total,
            locks=blocks.locks,
            top_k=top_k,
        )
        return product


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    weight13: torch.Tensor, scales13: torch.Tensor, zeros13: torch.Tensor | None, bias13: torch.Tensor | None,
    weight2: torch.Tensor, scales2: torch.Tensor, zeros2: torch.Tensor | None, bias2: torch.Tensor | None,
    facts13: Sequence[int], facts2: Sequence[int], count: int, on_input: bool,
    function: str, gated: bool, limit: float | None, alpha: float, up_offset: float,
) -> torch.Tensor:  # fmt: skip
    rows, hidden = x.shape
    y = x.new_empty(rows, hidden)
    if rows == 0:
        return y
    with torch.cuda.device_of(x):
        ids, weights = topk_ids.contiguous(), topk_weights.to(torch.float32).contiguous()
        choices = Choices(ids, None if expert_map is None else expert_map.contiguous(), count)
        top_k = topk_ids.shape[1]
        first = _Product(weight13, scales13, zeros13, bias13, Form(*facts13))
        second = _Product(weight2, scales2, zeros2, bias2, Form(*facts2))

        given = (x.to(torch.float32) * weights).to(x.dtype) if on_input else x
        entering = quantized(given, first.form) if first.form.float8 else Entering(given, None)
        choice = first.choose(choices, x.device)
        blocks = to_blocks(choices, choice.rows)
        product = first.multiply(entering, choice, count, blocks, top_k)
        entering = activated(product, choices, second.form, Activation(function, gated, limit, alpha, up_offset))
        choice = second.choose(choices, x.device)
        if choice.rows != blocks.rows:
            blocks = to_blocks(choices, choice.rows)
        product = second.multiply(entering, choice, count, blocks, 1)
        block = min(_COLUMNS, triton.next_power_of_2(hidden))
        combine[(rows, triton.cdiv(hidden, block))](
            product, ids, choices.local, weights, y, choices.total, count, choices.mapped, product.shape[1], hidden,
            MAP=choices.local is not None, TOP_K=top_k, ON_INPUT=on_input, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y


def _fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_PRODUCT = "Tensor weight{0}, Tensor scales{0}, Tensor? zeros{0}, Tensor? bias{0}, "
_SCHEMA = (
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    + _PRODUCT.format("13")
    + _PRODUCT.format("2")
    + "int[] facts13, int[] facts2, int experts, bool on_input, str function, bool gated, float? limit, float alpha, "
    "float up_offset) -> Tensor"
)


def _register() -> Callable[..., torch.Tensor]:
    torch.library.define("quantplug_humming::experts", _SCHEMA)
    # On the CPU only Triton's interpreter and a stand-in for humming run it, in tests.
    torch.library.impl("quantplug_humming::experts", ("CUDA", "CPU"), _experts)
    torch.library.register_fake("quantplug_humming::experts", _fake)
    operator: Callable[..., torch.Tensor] = torch.ops.quantplug_humming.experts.default
    return operator


experts = _register()
"""A layer of experts as one operator of torch, see `expertprepare.py` for the tensors."""
