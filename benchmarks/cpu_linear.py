"""
One linear layer on the CPU, by number of rows: `python -m benchmarks.cpu_linear [--json] [--quick]`.

Each figure is a ratio to BF16 `F.linear` that took its turn in the same round. Weights are cold: enough copies of each
layer take turns that none is still in a cache. Beside the ratios stand the floor (bytes of the weight over the
machine's read bandwidth) and what a call costs over the bare torch operator, eager and compiled.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import quantplug
from benchmarks.machine import describe, read_bandwidth
from benchmarks.synthetic import write_gptq

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantplug.modules import QuantizedLinear

    Call = Callable[[], object]

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096))
"""(N, K) of SmolLM2-135M, and one of a larger model."""
ROWS = (1, 4, 16, 64, 128, 512)
COLD_BYTES = 96_000_000
PATH = "model.layers.0.mlp.up_proj"

FORMATS: dict[str, dict[str, Any]] = {
    "4-bit g64": {"bits": 4, "group_size": 64},
    "4-bit g64 act-order": {"bits": 4, "group_size": 64, "act_order": True},
    "8-bit per row": {"bits": 8, "group_size": -1},
    "8-bit g64": {"bits": 8, "group_size": 64},
}


def layer(n: int, k: int, options: dict[str, Any], dtype: str = "bfloat16") -> QuantizedLinear:
    """Load one layer from a checkpoint, as a model would."""
    with tempfile.TemporaryDirectory() as name:
        write_gptq(Path(name), {PATH: (n, k)}, **options)
        plan = quantplug.plan(name, dtype=dtype)
        return quantplug.load_layers(plan, name).modules[PATH]


def turns(items: list[Any]) -> Iterator[Any]:
    """Yield the items over and over."""
    while True:
        yield from items


def copies(module: torch.nn.Module, nbytes: int) -> list[Any]:
    """Return so many copies of a module that no cache holds them all."""
    return [module, *(copy.deepcopy(module) for _ in range(max(1, COLD_BYTES // nbytes)))]


def bare(module: QuantizedLinear) -> tuple[Call | Any, ...]:
    """Return the torch operator a layer ends in, and its arguments after x."""
    held = {name.removeprefix("prepared_0_"): tensor for name, tensor in module.named_buffers()}
    if "codes_0" in held:
        return torch.ops.aten._weight_int8pack_mm.default, held["codes_0"], held["scales_0"]
    packed, pairs = held["packed_0"], held["pairs_0"]
    group = packed.shape[1] * 2 // pairs.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu.default, packed, group, pairs


def medians(
    calls: list[Call], rounds: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the median seconds per call of each; all take their turn in every round."""
    counts, samples = [], [[] for _ in calls]  # type: list[int], list[list[float]]
    for call in calls:
        call()
        started = clock()
        call()
        counts.append(max(1, int(seconds / max(1e-7, clock() - started))))
    for _ in range(rounds):
        for call, count, times in zip(calls, counts, samples, strict=True):
            started = clock()
            for _ in range(count):
                call()
            times.append((clock() - started) / count)
    return [statistics.median(times) for times in samples]


def pairs(ours: Call, bare: Call, *, rounds: int, calls: int = 15) -> list[tuple[float, float]]:
    """Return the seconds per call of two that differ by little; who goes first changes from round to round."""
    for call in (ours, bare):
        for _ in range(calls):
            call()
    result = []
    for number in range(rounds):
        seconds: dict[Call, float] = {}
        for call in (ours, bare) if number % 2 else (bare, ours):
            started = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[call] = (time.perf_counter() - started) / calls
        result.append((seconds[ours], seconds[bare]))
    return result


def measure_shape(n: int, k: int, rows: tuple[int, ...], rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """Return one row of figures per format and number of rows."""
    dense = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    dense_turns = turns(copies(dense, n * k * 2))
    loaded = {name: layer(n, k, options) for name, options in FORMATS.items()}
    held = {name: sum(b.nbytes for b in module.buffers()) for name, module in loaded.items()}
    module_turns = {name: turns(copies(module, held[name])) for name, module in loaded.items()}
    bare_turns = {name: turns([bare(module) for module in copies(loaded[name], held[name])]) for name in loaded}
    figures = []
    for m in rows:
        x = torch.randn(1, m, k, dtype=torch.bfloat16)
        calls: list[Call] = [lambda x=x: next(dense_turns)(x)]
        for name in loaded:
            wide = torch.randn(m, 2 * k if name == "8-bit g64" else k, dtype=torch.bfloat16)
            calls.append(lambda x=x, name=name: next(module_turns[name])(x))
            calls.append(lambda x=wide, name=name: _run_bare(next(bare_turns[name]), x))
        times = medians(calls, rounds, 0.02)
        for number, name in enumerate(loaded):
            ours, operator = times[1 + 2 * number], times[2 + 2 * number]
            figures.append(
                {
                    "shape": [n, k],
                    "rows": m,
                    "format": name,
                    "bf16_us": times[0] * 1e6,
                    "us": ours * 1e6,
                    "ratio_to_bf16": times[0] / ours,
                    "bare_operator_us": operator * 1e6,
                    "floor_us": held[name] / bandwidth * 1e6,
                    "bytes": held[name],
                }
            )
    return figures


def _run_bare(operator: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
    call, *arguments = operator
    y: torch.Tensor = call(x, *arguments)
    return y


class Chain(torch.nn.Module):
    """Square layers one after the other, or the bare operator with their weights."""

    def __init__(self, layers: list[QuantizedLinear], *, bare_operator: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self._operators = [bare(module) for module in layers] if bare_operator else []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run x `[1, 1, K]` through all of them."""
        if not self._operators:
            for module in self.layers:
                x = module(x)
            return x
        x = x.squeeze(0)
        for call, *arguments in self._operators:
            x = call(x, *arguments)
        return x.unsqueeze(0)


def measure_overhead(size: int, rounds: int, layers: int = 30) -> dict[str, float]:
    """Return what a layer costs over the bare operator at one row, eager and compiled, weights in the cache."""
    modules = copies(layer(size, size, FORMATS["4-bit g64"]), COLD_BYTES // layers)[:layers]
    x = torch.randn(1, 1, size, dtype=torch.bfloat16)
    result: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler warns about in itself
        for kind in ("eager", "compiled"):
            chains: list[Any] = [Chain(modules, bare_operator=bare_operator) for bare_operator in (False, True)]
            if kind == "compiled":
                chains = [torch.compile(chain, fullgraph=True) for chain in chains]
            times = pairs(*(lambda c=c: c(x) for c in chains), rounds=rounds)
            result |= {
                f"{kind}_us": statistics.median(ours for ours, _ in times) / len(modules) * 1e6,
                f"{kind}_bare_us": statistics.median(operator for _, operator in times) / len(modules) * 1e6,
                f"{kind}_over_us": statistics.median(a - b for a, b in times) / len(modules) * 1e6,
                f"{kind}_over_percent": (statistics.median(a / b for a, b in times) - 1) * 100,
            }
    return result


def measure(*, quick: bool) -> dict[str, Any]:
    """Return all figures."""
    bandwidth = read_bandwidth()
    shapes, rows, rounds = (SHAPES[:1], ROWS[:3], 5) if quick else (SHAPES, ROWS, 9)
    with torch.inference_mode():
        figures = [figure for n, k in shapes for figure in measure_shape(n, k, rows, rounds, bandwidth)]
        overhead = measure_overhead(576, 30 if quick else 150)
    return {"machine": describe(), "read_bandwidth": bandwidth, "layers": figures, "overhead": overhead}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape and few rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch; on a busy machine only 1 gives stable figures")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(quick=options.quick)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    machine = result["machine"]
    print(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"reads {result['read_bandwidth'] / 1e9:.1f} GB/s"
    )
    print(f"{'N x K':>12} {'M':>4} {'format':20} {'BF16 us':>9} {'us':>9} {'x BF16':>7} {'bare us':>9} {'floor us':>9}")
    for figure in result["layers"]:
        size = "{} x {}".format(*figure["shape"])
        print(
            f"{size:>12} {figure['rows']:>4} {figure['format']:20} {figure['bf16_us']:9.1f} {figure['us']:9.1f} "
            f"{figure['ratio_to_bf16']:7.2f} {figure['bare_operator_us']:9.1f} {figure['floor_us']:9.1f}"
        )
    over = result["overhead"]
    for kind, target in (("eager", "5 us"), ("compiled", "5 %")):
        print(
            f"{kind}: {over[f'{kind}_us']:.1f} us a layer, {over[f'{kind}_bare_us']:.1f} us bare: "
            f"{over[f'{kind}_over_us']:+.2f} us, {over[f'{kind}_over_percent']:+.1f} % (target {target})"
        )


if __name__ == "__main__":
    main()
