"""
How long a plan takes: 100,000 tensors of experts, headers only: `python -m benchmarks.planning [--json]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantplug
from quantplug.checkpoint import open_checkpoint
from quantplug.config import read_model_config, resolve_config
from quantplug.inventory import inventory_of
from quantplug.plugins import registry

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, EXPERTS = 66, 128
HIDDEN, INNER, GROUP = 2048, 1024, 128
SUFFIXES = {
    "qweight": ("I32", 4, lambda n, k: (k // 8, n)),
    "qzeros": ("I32", 4, lambda n, k: (k // GROUP, n // 8)),
    "scales": ("F16", 2, lambda n, k: (k // GROUP, n)),
    "g_idx": ("I32", 4, lambda n, k: (k,)),
}
PROJECTIONS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
TENSORS = LAYERS * EXPERTS * len(PROJECTIONS) * len(SUFFIXES)


def write(directory: Path) -> None:
    """Write a GPTQ checkpoint of experts whose data are a hole in a sparse file."""
    header: dict[str, Any] = {}
    position = 0
    for number in range(LAYERS * EXPERTS):
        for name, (n, k) in PROJECTIONS.items():
            for suffix, (dtype, width, shape) in SUFFIXES.items():
                size = width
                for dimension in shape(n, k):
                    size *= dimension
                path = f"model.layers.{number // EXPERTS}.mlp.experts.{number % EXPERTS}.{name}.{suffix}"
                header[path] = {"dtype": dtype, "shape": shape(n, k), "data_offsets": [position, position + size]}
                position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    model = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": 8}
    (directory / "config.json").write_text(json.dumps({**model, "quantization_config": config}))


def measure(runs: int = 5) -> dict[str, Any]:
    """Find the experts among the names, and plan for the CPU, several times; return medians."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        checkpoint, model_config, installed = open_checkpoint(Path(name)), read_model_config(Path(name)), registry()
        config = resolve_config(name, installed)
        steps: dict[str, Callable[[], Any]] = {
            "resolve": lambda: inventory_of(checkpoint, model_config, installed, config),
            "plan": lambda: quantplug.plan(name, platform="cpu"),
        }
        wall: dict[str, list[float]] = {step: [] for step in steps}
        cpu: dict[str, list[float]] = {step: [] for step in steps}
        for _ in range(runs):
            for step, work in steps.items():
                started = time.perf_counter(), time.process_time()
                work()
                wall[step].append(time.perf_counter() - started[0])
                cpu[step].append(time.process_time() - started[1])
        layers = len(quantplug.plan(name, platform="cpu").layers)
    return {
        "tensors": TENSORS,
        "layers": layers,
        **{f"{step}_seconds": statistics.median(times) for step, times in wall.items()},
        **{f"{step}_cpu_seconds": statistics.median(times) for step, times in cpu.items()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    result = measure()
    if parser.parse_args().json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{result['tensors']:,} tensors of experts in {result['layers']:,} layers: names resolved in "
            f"{result['resolve_seconds']:.2f} s ({result['resolve_cpu_seconds']:.2f} s of CPU), planned in "
            f"{result['plan_seconds']:.2f} s ({result['plan_cpu_seconds']:.2f} s of CPU)"
        )


if __name__ == "__main__":
    main()
