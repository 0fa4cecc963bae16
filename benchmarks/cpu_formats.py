"""
One linear layer on the CPU in every format: `python -m benchmarks.cpu_formats [--json] [--quick]`.

Measured as `cpu_linear` measures: each figure is a ratio to BF16 `F.linear` that took its turn in the same round, and
weights are cold. Layers are those a plan gives, quantized from one dense weight while it is loaded, so that the kernel
is the one that a user gets. Beside the ratios stand the floor (bytes of the layer over the machine's read bandwidth)
and the bytes per weight that are held.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import quantplug
from benchmarks.cpu_linear import PATH, copies, medians, turns
from benchmarks.machine import describe, read_bandwidth
from benchmarks.synthetic import write_gptq

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.modules import QuantizedLinear

SHAPES = ((576, 576), (1536, 576), (4096, 4096))
ROWS = (1, 4, 16, 64, 128, 512)

GPTQ = {"gptq int4 g64": {"bits": 4, "group_size": 64}}
"""What `write_gptq` is told."""

RECIPES = {
    "int4 g32": "int4-g32",
    "int4 g64": "int4-g64",
    "int4 g128": "int4-g128",
    "uint4 g64": "uint4-g64",
    "uint4 g128 (as AWQ)": "uint4-g128",
    "int8 per row": "int8",
    "W8A8 per token": "w8a8",
    "fp8 per tensor": "fp8-tensor",
    "fp8 per row": "fp8",
    "fp8 blocks of 128": "fp8-block",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
"""Recipe of each format that dense weights are quantized to while they are loaded."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """
    A layer of one format.

    Attributes:
        module: the layer.
        kernels: names of the kernels that a plan chose, by the first number of rows.
        held: its bytes.
    """

    module: QuantizedLinear
    kernels: dict[int, str]
    held: int


def load(n: int, k: int, name: str) -> Loaded:
    """Load one layer as a model would: a GPTQ one from a checkpoint of its own, others from a dense one."""
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        if name in RECIPES:
            dense = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
            save_file({f"{PATH}.weight": dense}, directory / "model.safetensors", {"format": "pt"})
            (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        else:
            write_gptq(directory, {PATH: (n, k)}, **GPTQ[name])
        plan = quantplug.plan(directory, dtype="bfloat16", quantize=RECIPES.get(name))
        module = quantplug.load_layers(plan, directory).modules[PATH]
    kernels = {choice.min_rows: choice.kernel for choice in plan.decisions[0].choices}
    return Loaded(module, kernels, sum(buffer.nbytes for buffer in module.buffers()))


def measure_shape(
    n: int, k: int, formats: tuple[str, ...], rows: tuple[int, ...], rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return one row of figures per format and number of rows."""
    dense = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    bandwidth = read_bandwidth()
    loaded = {name: load(n, k, name) for name in formats}
    calls_of = [turns(copies(dense, n * k * 2)), *(turns(copies(each.module, each.held)) for each in loaded.values())]
    figures = []
    for m in rows:
        x = torch.randn(1, m, k, dtype=torch.bfloat16)
        calls = [lambda modules=modules, x=x: next(modules)(x) for modules in calls_of]
        bf16, *times = medians(calls, rounds, 0.02, clock)
        for (name, each), seconds in zip(loaded.items(), times, strict=True):
            figures.append(
                {
                    "shape": [n, k],
                    "rows": m,
                    "format": name,
                    "kernel": next(kernel for first, kernel in reversed(each.kernels.items()) if m >= first),
                    "bf16_us": bf16 * 1e6,
                    "us": seconds * 1e6,
                    "ratio_to_bf16": bf16 / seconds,
                    "floor_us": each.held / bandwidth * 1e6,
                    "bytes_per_weight": each.held / (n * k),
                }
            )
    return figures


def measure(*, quick: bool, clock: Callable[[], float]) -> dict[str, Any]:
    """Return all figures."""
    formats = (*GPTQ, *RECIPES)
    shapes, rows, rounds = (SHAPES[:1], ROWS[:3], 5) if quick else (SHAPES, ROWS, 9)
    with torch.inference_mode():
        figures = [figure for n, k in shapes for figure in measure_shape(n, k, formats, rows, rounds, clock)]
    return {"machine": describe(), "read_bandwidth": read_bandwidth(), "layers": figures}


def table(figures: list[dict[str, Any]]) -> str:
    """Return the ratios in Markdown, a row per shape and format; the time of one row stands beside its floor."""
    rows = sorted({figure["rows"] for figure in figures})
    heads = [
        "N x K",
        "format",
        "kernel",
        "bytes a weight",
        "floor us",
        "us",
        *(f"M = {m}" if m == rows[0] else str(m) for m in rows),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    by_layer: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figure in figures:
        by_layer.setdefault(("{} x {}".format(*figure["shape"]), figure["format"]), []).append(figure)
    for (size, name), some in by_layer.items():
        kernels = ", ".join(dict.fromkeys(figure["kernel"] for figure in some))
        first = some[0]
        facts = [f"{first['bytes_per_weight']:.2f}", f"{first['floor_us']:.1f}", f"{first['us']:.1f}"]
        ratios = [f"{figure['ratio_to_bf16']:.2f}" for figure in some]
        lines.append("| " + " | ".join([size, name, kernels, *facts, *ratios]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape and few rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch; on a busy machine only 1 gives stable figures")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, which others do not disturb")
    options = parser.parse_args()
    if options.processor_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    result = measure(quick=options.quick, clock=clock)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    machine = result["machine"]
    print(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"reads {result['read_bandwidth'] / 1e9:.1f} GB/s; ratio to BF16 F.linear\n"
    )
    print(table(result["layers"]))


if __name__ == "__main__":
    main()
