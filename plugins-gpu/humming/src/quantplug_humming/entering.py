"""
What enters humming's products for experts: x, and what f makes of the first product, in bfloat16 or quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from quantplug_humming.expertdevice import between, between_float8, quantize

if TYPE_CHECKING:
    from quantplug_humming.form import Form
    from quantplug_humming.routing import Choices

_FLOAT8 = torch.float8_e4m3fn
_WRITTEN: torch.dtype = torch.float32 if triton.knobs.runtime.interpret else _FLOAT8
"""What codes are written in: Triton's interpreter cuts off where it converts to 8-bit floats; torch converts then."""

_TOP, _LEAST = 448.0, torch.finfo(torch.float32).tiny
"""The largest code, and the smallest scale."""

_GROUP = 128
_ALIGNED = 4
"""humming reads scales of so many rows at once."""

_COLUMNS, _MANY_COLUMNS, _MANY = 512, 1024, 1 << 22
"""Elements of a program: more, and so 16 bytes for each thread, where there are programs enough."""


class Entering(NamedTuple):
    """
    Rows that enter a product.

    Attributes:
        values: bfloat16 `[rows, K]`, or codes `[rows, K filled up]`.
        scales: float32 `[rows, 1]` of codes, or `[rows, K filled up / 128]`, or None.
    """

    values: torch.Tensor
    scales: torch.Tensor | None


class Activation(NamedTuple):
    """The function between the products, see `quantplug.moe.ExpertFunction`."""

    name: str
    gated: bool
    limit: float | None
    alpha: float
    up_offset: float


def quantized(x: torch.Tensor, form: Form) -> Entering:
    """Return codes and scales of x `[M, K]`, of any strides, for the product of a form."""
    made = _room(len(x), form, x.device)
    quantize[(len(x),)](
        x, made.values, made.scales, x.shape[1], made.values.shape[1], *x.stride(), **_how(form),
    )  # fmt: skip
    return made._replace(values=made.values.to(_FLOAT8))


def activated(product: torch.Tensor, choices: Choices, form: Form, f: Activation) -> Entering:
    """Return f of the first product for the second, of a form; rows of choices that are nobody's hold anything."""
    count, width = choices.total, form.inputs
    named = (count, choices.experts, choices.mapped)
    numbers = (0.0 if f.limit is None else f.limit, f.alpha, f.up_offset)
    how = {"MAP": choices.local is not None, "GATED": f.gated, "LIMITED": f.limit is not None, "NAME": f.name}
    if form.float8:
        made = _room(count, form, product.device)
        between_float8[(count,)](
            product, choices.ids, choices.local, made.values, made.scales, *named, width, made.values.shape[1],
            *numbers, **how, **_how(form),
        )  # fmt: skip
        return made._replace(values=made.values.to(_FLOAT8))
    h = product.new_empty(count, width)
    block = min(_MANY_COLUMNS if h.numel() > _MANY else _COLUMNS, triton.next_power_of_2(width))
    between[(count, triton.cdiv(width, block))](
        product, choices.ids, choices.local, h, *named, width, *numbers, **how, BLOCK=block, num_warps=4
    )
    return Entering(h, None)


def _room(rows: int, form: Form, device: torch.device) -> Entering:
    """Return room for codes and scales of so many rows."""
    inputs = form.filled[1]
    shape = (-(-rows // _ALIGNED) * _ALIGNED, inputs // _GROUP if _spread(form) else 1)
    return Entering(
        torch.empty(rows, inputs, dtype=_WRITTEN, device=device),
        torch.empty(shape, dtype=torch.float32, device=device)[:rows],
    )


def _how(form: Form) -> dict[str, int | float]:
    """Return how rows are quantized, and the warps of a program, which takes a whole row."""
    groups = triton.next_power_of_2(form.filled[1] // _GROUP)
    return {
        "TOP": _TOP, "LEAST": _LEAST, "GROUPED": form.block > 0, "SPREAD": _spread(form), "GROUPS": groups,
        "num_warps": max(1, min(16, groups // 4)),
    }  # fmt: skip


def _spread(form: Form) -> bool:
    """Return whether humming wants a scale for each 128 inputs."""
    return bool(form.block or form.promoted)
