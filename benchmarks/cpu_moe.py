"""
A layer of routed experts on the CPU: `python -m benchmarks.cpu_moe [--json] [--quick] [--threads N]`.

Every format runs three ways, in turns within each round: by the kernel of quantplug-cpu for experts, by the core's loop
over the linear kernel that this one rests on, and, as a peer, by a plain loop over experts in BF16. Routers choose
uniformly, anew for each call, so that the weights of a call come from memory. Figures are medians over rounds. Beside
them stands the floor: the bytes of the experts that have rows over the machine's read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cpu_linear import medians, turns
from benchmarks.machine import describe, read_bandwidth
from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.moeloop import LoopKernel
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, WeightSpec, scale_shape
from quantplug.weight import Weight
from quantplug_cpu.experts import DenseExperts, Int4Experts, Int8Experts, StackedKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantplug.expertweights import PreparedExperts

    Routing = tuple[torch.Tensor, torch.Tensor]
    Clock = Callable[[], float]
    Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """
    A layer of experts, after a model.

    Attributes:
        name: the model, and what is different here.
        hidden: H.
        intermediate: I.
        experts: E.
        top_k: T.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = (
    Shape("Qwen3-30B-A3B, 64 of its 128 experts", 2048, 768, 64, 8),
    Shape("Granite-3.0-1B-A400M", 1024, 512, 32, 8),
    Shape("Mixtral-8x7B, half as wide", 2048, 7168, 8, 2),
)
ROWS = (1, 4, 16, 64, 512)
COLUMNS = {
    "us": "us",
    "x loop": "ratio_to_loop",
    "x BF16": "ratio_to_bf16",
    "loop us": "loop_us",
    "BF16 us": "bf16_us",
    "floor us": "floor_us",
}
CALLS = 32
"""Different routings that take turns."""

FORMATS: dict[str, tuple[WeightSpec, StackedKernel]] = {
    "int4 g128": (WeightSpec(ElementType.INT4, PerGroup(128), "bfloat16"), Int4Experts()),
    "int8 per row": (WeightSpec(ElementType.INT8, PerChannel(), "bfloat16"), Int8Experts()),
    "fp8 blocks": (WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32"), DenseExperts()),
}


def weight(spec: WeightSpec, n: int, k: int) -> Weight:
    """Return a random weight of an even spread of codes."""
    if spec.element.floating:
        # Below 0x70 every byte is a finite number of the format.
        codes = torch.randint(0x70, (n, k), dtype=torch.uint8).view(getattr(torch, spec.element))
    else:
        half = 1 << (spec.element.bits - 1)
        codes = torch.randint(-half, half, (n, k), dtype=torch.int8)
    scales = torch.rand(scale_shape(spec.granularity, n, k)).mul_(1e-4)
    return Weight(codes, scales.to(getattr(torch, spec.scale_dtype)), spec)


def experts(shape: Shape, spec: WeightSpec) -> Iterator[ExpertWeights]:
    """Yield the experts of a layer; they are equal, but each is prepared and held by itself."""
    wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    gate, up, down = weight(spec, *wide), weight(spec, *wide), weight(spec, *tall)
    for _ in range(shape.experts):
        # Kernels may keep codes without a copy; then these must not be those of another expert.
        yield ExpertWeights((gate, up), replace(down, codes=down.codes.clone()))


def problem_of(shape: Shape, spec: WeightSpec) -> MoEProblem:
    """Return the problem of a layer."""
    sizes = (shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    return MoEProblem(*sizes, (spec, spec), spec, ExpertFunction(), "bfloat16")


def routings(shape: Shape, rows: int) -> list[Routing]:
    """Return weights and ids of routers that choose uniformly."""
    found = []
    for number in range(CALLS):
        generator = torch.Generator().manual_seed(number)
        weights, ids = torch.rand(rows, shape.experts, generator=generator).topk(shape.top_k)
        found.append((weights / weights.sum(1, keepdim=True), ids))
    return found


def active(shape: Shape, rows: int) -> float:
    """Return how many experts have rows, on average over the routings."""
    return sum(len(ids.unique()) for _, ids in routings(shape, rows)) / CALLS


def dense_loop(shape: Shape) -> Layer:
    """Return experts in BF16, run as Transformers does: those that have rows, one after the other."""
    gate_up = torch.randn(shape.experts, 2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16).mul_(0.02)
    down = torch.randn(shape.experts, shape.hidden, shape.intermediate, dtype=torch.bfloat16).mul_(0.02)

    def run(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        chosen = torch.nn.functional.one_hot(topk_ids, shape.experts).permute(2, 1, 0)
        for expert in (chosen.sum((-1, -2)) > 0).nonzero().flatten().tolist():
            place, rows = torch.where(chosen[expert])
            gate, up = torch.nn.functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
            output = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[expert])
            y.index_add_(0, rows, (output * topk_weights[rows, place, None]).to(y.dtype))
        return y

    return run


def prepared_both(shape: Shape, spec: WeightSpec, kernel: StackedKernel) -> tuple[PreparedExperts, PreparedExperts]:
    """Return a layer as the kernel and as the loop over its linear kernel prepare it."""
    problem, device = problem_of(shape, spec), torch.device("cpu")
    loop = LoopKernel(kernel.linear)
    return kernel.prepare(problem, experts(shape, spec), device), loop.prepare(problem, experts(shape, spec), device)


def call(run: Layer, x: torch.Tensor, given: Iterator[Routing]) -> Callable[[], torch.Tensor]:
    """Return a call of a layer with the next routing."""
    return lambda: run(x, *next(given))


def measure_shape(
    shape: Shape, rows: tuple[int, ...], rounds: int, bandwidth: float, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Yield one row of figures per format and number of rows."""
    dense = dense_loop(shape)
    for name, (spec, kernel) in FORMATS.items():
        loop = LoopKernel(kernel.linear)
        mine, loops = prepared_both(shape, spec, kernel)
        runs: list[Layer] = [
            dense,
            lambda x, w, i, kernel=kernel, held=mine: kernel.apply(x, w, i, held),
            lambda x, w, i, kernel=loop, held=loops: kernel.apply(x, w, i, held),
        ]
        for m in rows:
            x = torch.randn(m, shape.hidden, dtype=torch.bfloat16)
            times = medians([call(run, x, turns(routings(shape, m))) for run in runs], rounds, 0.1, clock)
            working = active(shape, m)
            yield {
                "shape": shape.name,
                "rows": m,
                "format": name,
                "active": working,
                "bf16_us": times[0] * 1e6,
                "us": times[1] * 1e6,
                "loop_us": times[2] * 1e6,
                "ratio_to_loop": times[2] / times[1],
                "ratio_to_bf16": times[0] / times[1],
                "floor_us": mine.nbytes / shape.experts * working / bandwidth * 1e6,
                "bytes": mine.nbytes,
            }


def measure_active(rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Return the time of one row by experts that are held and experts that it chooses: only the latter should count."""
    spec, kernel = FORMATS["int4 g128"]
    cases = [replace(SHAPES[0], experts=e, top_k=t) for e, t in ((16, 8), (32, 8), (64, 8), (64, 2), (64, 4), (64, 16))]
    calls = []
    for shape in cases:
        held = kernel.prepare(problem_of(shape, spec), experts(shape, spec), torch.device("cpu"))
        x = torch.randn(1, shape.hidden, dtype=torch.bfloat16)
        run: Layer = lambda x, w, i, held=held: kernel.apply(x, w, i, held)  # noqa: E731  # closes over what is held
        calls.append(call(run, x, turns(routings(shape, 1))))
    times = medians(calls, rounds, 0.05, clock)
    return [
        {"experts": shape.experts, "top_k": shape.top_k, "us": time * 1e6}
        for shape, time in zip(cases, times, strict=True)
    ]


def measure(*, quick: bool, clock: Clock, show: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures, and show each as soon as it is there."""
    bandwidth = read_bandwidth(clock=clock)
    shapes, rows, rounds = (SHAPES[:1], ROWS[:3], 5) if quick else (SHAPES, ROWS, 9)
    machine = describe()
    show("{processor}, {threads} threads, torch {torch}".format(**machine) + f", reads {bandwidth / 1e9:.1f} GB/s")
    figures: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in shapes:
            show(f"\n{shape.name}\n{'format':14} {'M':>4} {'active':>7} " + " ".join(f"{name:>9}" for name in COLUMNS))
            for figure in measure_shape(shape, rows, rounds, bandwidth, clock):
                times = " ".join(f"{figure[key]:9.{2 * ('ratio' in key)}f}" for key in COLUMNS.values())
                show(f"{figure['format']:14} {figure['rows']:>4} {figure['active']:7.1f} {times}")
                figures.append(figure)
        show("\nint4 g128, one row\nexperts held, chosen, us")
        growth = measure_active(rounds, clock)
        for case in growth:
            show(f"{case['experts']:>4} {case['top_k']:>4} {case['us']:9.0f}")
    return {"machine": machine, "read_bandwidth": bandwidth, "layers": figures, "growth": growth}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape and few rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, which others do not disturb")
    options = parser.parse_args()
    if options.processor_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    result = measure(
        quick=options.quick, clock=clock, show=lambda line: None if options.json else print(line, flush=True)
    )
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
