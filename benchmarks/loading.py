"""
Loading quantized layers: `python -m benchmarks.loading [--json] [--megabytes 400]`.

Two synthetic checkpoints: 4-bit GPTQ, which is decoded and packed anew, and 8-bit codes that the CPU kernel takes as
they lie in the file. Reading, decoding and preparing are timed apart, then the whole load; each in MB/s of file bytes,
beside the fastest way to move the bytes in question. Peak memory is measured in a process of its own. Files are read
from the page cache: a disk would only hide the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import describe
from benchmarks.synthetic import write_gptq
from quantplug.checkpoint import open_checkpoint
from quantplug.load import load_layers
from quantplug.planner import plan as make_plan
from quantplug.plugins import build_registry
from quantplug.reader import TensorReader
from quantplug.schemes import SchemeCache
from quantplug_cpu import plugin as cpu
from quantplug_gptq import plugin as gptq
from quantplug_testkit import toys

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.plan import LayerPlan, Plan
    from quantplug.registry import Registry

BLOCK = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in ("q", "k", "v", "o")},
    **{f"mlp.{name}_proj": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
FORMATS = ("gptq 4-bit g64", "8-bit as stored")
MEGABYTE = 1_000_000
FLOORS = {"decode": "copying the codes", "prepare": "copying the result", "total": "reading alone"}


def registry() -> Registry:
    """Return the plugins that take part; of the testkit's toys the format only, whose codes are canonical as stored."""
    format_only = SimpleNamespace(
        quantplug_schemes=toys.quantplug_schemes, quantplug_dialects=toys.quantplug_dialects, __name__="toys"
    )
    return build_registry({"quantplug-cpu": cpu, "quantplug-gptq": gptq, "toys": format_only})


def write(directory: Path, kind: str, megabytes: int) -> None:
    """Write a checkpoint of about that size."""
    weights = sum(n * k for n, k in BLOCK.values())
    blocks = max(1, round(megabytes * MEGABYTE / (weights * (0.54 if kind == FORMATS[0] else 1.0))))
    layers = {f"model.layers.{b}.{name}": shape for b in range(blocks) for name, shape in BLOCK.items()}
    if kind == FORMATS[0]:
        write_gptq(directory, layers)
        return
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, (n, k) in layers.items():
        tensors[f"{path}.codes"] = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        tensors[f"{path}.scale"] = torch.rand(n, 1, generator=generator) * 0.01 + 0.01
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "quantization_config": {"quant_method": "toy", "keep": []}}
    (directory / "config.json").write_text(json.dumps(config))


def seconds(work: Callable[[], object], runs: int) -> float:
    """Return the median duration."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def turns(one: Callable[[], object], other: Callable[[], object], runs: int) -> tuple[list[float], list[float]]:
    """Return the durations of two that take turns, each on memory that nothing has used yet."""
    trim = ctypes.CDLL(None).malloc_trim
    durations: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, found in zip((one, other), durations, strict=True):
            gc.collect()
            trim(0)
            found.append(seconds(work, 1))
    return durations


def measure(kind: str, megabytes: int, runs: int) -> dict[str, Any]:
    """Return the figures of one format."""
    found = registry()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), kind, megabytes)
        plan = make_plan(name, dtype="bfloat16", registry=found)
        quantized = [layer for layer in plan.layers if layer.quantized]
        size = sum(layer.file_bytes for layer in quantized)
        checkpoint = open_checkpoint(Path(name))

        def read() -> list[torch.Tensor]:
            # Kept until all are read, as a model is: memory that nothing has used yet is part of the work.
            names = [name for layer in quantized for segment in layer.segments for _, name in segment.tensors]
            with TensorReader(checkpoint) as reader:
                return [reader.read(name) for name in names]

        read()
        parts = _parts(plan, quantized, checkpoint, found, runs)
        reading, loading = turns(read, lambda: load_layers(plan, name, registry=found), runs)
        figures = {
            "file_bytes": size,
            "read": statistics.median(reading),
            **parts,
            "total": statistics.median(loading),
            "of_read_rate": statistics.median(r / t for r, t in zip(reading, loading, strict=True)),
        }
        command = [sys.executable, "-m", "benchmarks.loading", "--memory-of", name]
        memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"format": kind, "kernel": plan.decisions[0].kernel, **figures, **memory}


def _parts(plan: Plan, layers: list[LayerPlan], checkpoint: Any, found: Registry, runs: int) -> dict[str, float]:
    """Return the seconds that decoding and preparing take, and those of merely moving the same bytes."""
    schemes = SchemeCache(found)
    spent: dict[str, float] = {"decode": 0.0, "decode_floor": 0.0, "prepare": 0.0, "prepare_floor": 0.0}
    for layer in layers:
        segment = layer.segments[0]
        scheme = schemes.get(segment.scheme, segment.name)
        decision = plan.decision_of(layer)
        if decision is None or layer.problem is None:
            continue
        kernel, problem = found.kernel(decision.kernel).item, layer.problem
        with TensorReader(checkpoint) as reader:
            stored = {suffix: reader.read(tensor) for suffix, tensor in segment.tensors}
        weight = scheme.decode(stored, segment.shape, segment.name)
        prepared = kernel.prepare(problem, [weight], [None], torch.device("cpu"))
        spent["decode"] += seconds(lambda s=stored, g=segment, f=scheme: f.decode(s, g.shape, g.name), runs)
        spent["prepare"] += seconds(
            lambda p=problem, w=weight, f=kernel: f.prepare(p, [w], [None], torch.device("cpu")), runs
        )
        spent["decode_floor"] += seconds(lambda w=weight: w.codes.clone(), runs)
        packed = max(prepared.tensors.values(), key=lambda tensor: tensor.nbytes)
        spent["prepare_floor"] += seconds(lambda t=packed: t.clone(), runs)
    return spent


def memory_of(directory: str) -> dict[str, int]:
    """Load a checkpoint in this process and return what it took at most, and what the layers hold."""
    found = registry()
    plan = make_plan(directory, dtype="bfloat16", registry=found)
    before = status("VmRSS")
    loaded = load_layers(plan, directory, registry=found)
    largest = max(layer.problem.in_features * layer.problem.out_features for layer in plan.layers if layer.problem)
    return {
        "peak_bytes": status("VmHWM") - before,
        "final_bytes": loaded.report.prepared_bytes,
        "layer_bytes": max(layer.file_bytes for layer in plan.layers) + largest,
    }


def status(field: str) -> int:
    """Return a size of this process in bytes: resident now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def show(result: dict[str, Any]) -> None:
    """Print the figures of one format."""
    size = result["file_bytes"]
    print(f"{result['format']}, {size / MEGABYTE:.0f} MB of tensors, kernel {result['kernel']}")
    for stage, floor in (("read", None), ("decode", "decode_floor"), ("prepare", "prepare_floor"), ("total", "read")):
        rate = size / result[stage] / MEGABYTE
        beside = "" if floor is None else f"   {FLOORS[stage]}: {size / result[floor] / MEGABYTE:.0f}"
        ratio = f" ({result['of_read_rate']:.2f} of it, median of turns)" if stage == "total" else ""
        print(f"  {stage:8} {rate:7.0f} MB/s{beside}{ratio}")
    peak, final, largest = (result[f"{name}_bytes"] / MEGABYTE for name in ("peak", "final", "layer"))
    print(
        f"  peak     {peak:7.0f} MB, {peak - final:+.0f} over the {final:.0f} that stay "
        f"(allowed: one layer, {largest:.0f}, and 300)"
    )


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of)))
        return
    results = [measure(kind, options.megabytes, options.runs) for kind in FORMATS]
    if options.json:
        print(json.dumps({"machine": describe(), "formats": results}, indent=2))
        return
    for result in results:
        show(result)


if __name__ == "__main__":
    main()
