"""
The operator of torch that runs a mixture of experts in FP8, and what it launches.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.cudacalls import stream_of
from quantplug.expertlimits import FUNCTIONS
from quantplug_marlin.device import build_all, function, target_of
from quantplug_marlin.driver import Launch, rows_map
from quantplug_marlin.float8cut import INPUTS, ROWS, choose, every_cut
from quantplug_marlin.launch import at, register
from quantplug_marlin.routing import add_up, kernels, route
from quantplug_marlin.seen import refuse_tangents

if TYPE_CHECKING:
    from quantplug.expertweights import PreparedExperts
    from quantplug_marlin.side import Places

_QUANTIZE = Struct("5P2q4i")
_BETWEEN = Struct("5P5i3f")
_MULTIPLY = Struct("8P6i40x")  # behind two tensor maps, half as long as one
_FEWEST_THREADS, _MOST_THREADS = 64, 1024
_THREADS_AT_ONCE = 2048
"""That a multiprocessor has."""


class _Quantized(NamedTuple):
    """
    Rows that enter a product, at their places; those of empty places hold anything.

    Attributes:
        codes: uint8 `[places, K filled up]`, float8_e4m3fn bit by bit.
        scales: float32 `[places]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def _threads(width: int) -> int:
    """Return the threads that take a row of so many elements, eight of them each, or more than once that."""
    return max(_FEWEST_THREADS, min(_MOST_THREADS, 1 << (-(-width // 8) - 1).bit_length()))


def _row_definitions(width: int) -> dict[str, int]:
    threads = _threads(width)
    return {"THREADS": threads, "TURNS": -(-width // (8 * threads))}


def _between_definitions(width: int, kind: int, *, gated: bool, limited: bool, half: bool) -> dict[str, int]:
    facts = {"GATED": int(gated), "FUNCTION": kind, "LIMITED": int(limited), "HALF": int(half)}
    return _row_definitions(width) | facts


def build(prepared: PreparedExperts) -> None:
    """Have every kernel compiled and loaded that a call may need, so that no call compiles."""
    problem, device = prepared.problem, prepared.tensors["w2.codes"].get_device()
    half, f = problem.dtype == "float16", problem.function
    wanted = dict(kernels(half=half))
    hidden, between = prepared.tensors["w13.codes"].shape[2], prepared.tensors["w2.codes"].shape[2]
    facts = _row_definitions(hidden) | {"HALF": int(half)}
    wanted["quantize.cu", tuple(facts.items())] = ("quantize", 0)
    facts = _between_definitions(
        between, FUNCTIONS.index(f.name), gated=f.gated, limited=f.limit is not None, half=half
    )
    wanted["between.cu", tuple(facts.items())] = ("between_products", 0)
    for cut in every_cut(target_of(device)):
        for product in (1, 2):
            key = cut.file, tuple(cut.definitions(product, half=half).items())
            wanted[key] = ("multiply", cut.shared_bytes)
    build_all(wanted, device)


def apply(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Return y `[M, H]`."""
    refuse_tangents(x, topk_weights)
    problem, tensors, f = prepared.problem, prepared.tensors, prepared.problem.function
    facts = [
        problem.intermediate, FUNCTIONS.index(f.name), int(f.gated), int(f.limit is not None),
        int(problem.router_weight_on_input),
    ]  # fmt: skip
    numbers = [f.limit if f.limit is not None else 0.0, f.alpha, f.up_offset]
    return float8_experts(
        x, topk_weights, topk_ids, expert_map,
        tensors["w13.codes"], tensors["w13.scales"], tensors.get("b13"),
        tensors["w2.codes"], tensors["w2.scales"], tensors.get("b2"), facts, numbers,
    )  # fmt: skip


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None,
    codes13: torch.Tensor, scales13: torch.Tensor, bias13: torch.Tensor | None, codes2: torch.Tensor,
    scales2: torch.Tensor, bias2: torch.Tensor | None, facts: list[int], numbers: list[float],
) -> torch.Tensor:  # fmt: skip
    device = x.get_device()
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _experts(
                x, topk_weights, topk_ids, expert_map, codes13, scales13, bias13, codes2, scales2, bias2, facts, numbers
            )
    rows, hidden = x.shape
    y = x.new_empty((rows, hidden))
    if rows == 0:
        return y
    between, kind, gated, limited, on_input = facts
    stream, choices = stream_of(device), topk_ids.numel()
    weights = topk_weights.to(torch.float32).contiguous()
    routed = route(topk_ids, expert_map, len(codes2), ROWS, stream)
    places = routed.places

    entering = _quantize(x, codes13.shape[2], places, choices // rows, stream)
    product = x.new_empty((places.blocks * ROWS, codes13.shape[1]))
    _multiply(1, entering, codes13, scales13, bias13, product, between, choices, weights if on_input else None,
              places, stream)  # fmt: skip
    del entering  # memory for what follows, which the same stream writes
    how = _between_definitions(
        codes2.shape[2], kind, gated=bool(gated), limited=bool(limited), half=x.dtype == torch.float16
    )
    h = _between(product, codes2.shape[2], between, how, numbers, places, stream)
    del product
    outputs = x.new_empty((choices, hidden))
    _multiply(2, h, codes2, scales2, bias2, outputs, hidden, choices, None, places, stream)
    add_up(outputs, None if on_input else weights, routed, y, stream)
    return y


def _room(x: torch.Tensor, width: int, places: Places) -> _Quantized:
    count = places.blocks * ROWS
    return _Quantized(x.new_empty((count, width), dtype=torch.uint8), x.new_empty(count, dtype=torch.float32))


def _grid(places: Places, threads: int, device: int) -> tuple[int, int, int]:
    """Return the grid for rows at their places: as many blocks of threads as run at once."""
    return min(places.blocks * ROWS, _THREADS_AT_ONCE // threads * target_of(device).processors), 1, 1


def _quantize(x: torch.Tensor, width: int, places: Places, top_k: int, stream: int) -> _Quantized:
    """Return rows of x `[M, K]`, of any strides, at the places of their choices."""
    made, device = _room(x, width, places), x.get_device()
    facts = _row_definitions(width) | {"HALF": int(x.dtype == torch.float16)}
    found, threads = function("quantize.cu", "quantize", facts, 0, device), facts["THREADS"]
    launch = Launch(found, _grid(places, threads, device), threads, 0, stream, overlap=True)
    to = made.codes.data_ptr(), made.scales.data_ptr(), places.order, places.used
    launch(_QUANTIZE.pack(x.data_ptr(), *to, *x.stride(), x.shape[1], width, ROWS, top_k))
    return made


def _between(
    product: torch.Tensor, width: int, size: int, how: dict[str, int], numbers: list[float], places: Places, stream: int
) -> _Quantized:
    """Return f of the first product `[places, gate and up filled up]`, `size` numbers of each, at the same places."""
    made, device, stride = _room(product, width, places), product.get_device(), product.shape[1]
    found, threads = function("between.cu", "between_products", how, 0, device), how["THREADS"]
    launch = Launch(found, _grid(places, threads, device), threads, 0, stream, overlap=True)
    to = made.codes.data_ptr(), made.scales.data_ptr(), places.order, places.used
    filled = stride // 2 if how["GATED"] else stride
    launch(_BETWEEN.pack(product.data_ptr(), *to, size, width, ROWS, stride, filled, *numbers))
    return made


def _multiply(
    number: int, entering: _Quantized, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
    y: torch.Tensor, size: int, choices: int, weights: torch.Tensor | None, places: Places, stream: int,
) -> None:  # fmt: skip
    """
    Launch a product.

    Args:
        number: 1 or 2.
        entering: rows of x.
        codes: of all experts, `[E, N, K]`.
        scales: `[E, N]`.
        bias: `[E, projections * size]`, or None.
        y: what is written: a row for each place, or for each choice.
        size: outputs of a projection that are not filled up.
        choices: their number.
        weights: the router's, where they multiply x.
        places: of rows of x.
        stream: as the driver knows it.
    """
    (experts, filled, width), device = codes.shape, y.get_device()
    target = target_of(device)
    cut = choose(filled, width, choices, experts, target)
    definitions = cut.definitions(number, half=y.dtype == torch.float16)
    found = function(cut.file, "multiply", definitions, cut.shared_bytes, device)
    grid = (min(cut.pieces(filled, places.blocks), target.processors), 1, 1)
    launch = Launch(found, grid, cut.threads, cut.shared_bytes, stream, overlap=True)
    maps = rows_map(entering.codes.data_ptr(), len(entering.codes), width, ROWS)
    maps += rows_map(codes.data_ptr(), experts * filled, width, cut.wide)
    projections = 1 if bias is None else bias.shape[1] // size
    outputs = y.shape[1]
    launch(
        maps
        + _MULTIPLY.pack(
            entering.scales.data_ptr(), scales.data_ptr(), at(bias), at(weights), y.data_ptr(), places.order,
            places.owners, places.used, outputs, filled, -(-width // INPUTS), outputs, projections, size,
        )
    )  # fmt: skip


def _fake_experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


float8_experts = register(
    "float8_experts",
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor codes13, Tensor scales13, "
    "Tensor? bias13, Tensor codes2, Tensor scales2, Tensor? bias2, int[] facts, float[] numbers) -> Tensor",
    _experts,
    _fake_experts,
)
"""
`y [M, H]` of a mixture of experts in FP8 as one operator of torch, see `quantplug.expertrows` for the tensors.

`facts`: I, the number of f in `FUNCTIONS`, whether it is gated, whether it has a limit, and whether the router's
weights multiply x. `numbers`: the limit or 0, alpha, and what is added to up.
"""
