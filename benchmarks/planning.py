"""
How long a plan takes: 100,000 tensors, headers only: `python -m benchmarks.planning [--json]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import quantplug

TENSORS = 100_000
HIDDEN, INNER, GROUP = 2048, 1024, 128
SUFFIXES = {
    "qweight": ("I32", 4, lambda n, k: (k // 8, n)),
    "qzeros": ("I32", 4, lambda n, k: (k // GROUP, n // 8)),
    "scales": ("F16", 2, lambda n, k: (k // GROUP, n)),
    "g_idx": ("I32", 4, lambda n, k: (k,)),
}
PROJECTIONS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def write(directory: Path, count: int = TENSORS) -> None:
    """Write a GPTQ checkpoint of that many tensors whose data are a hole in a sparse file."""
    header: dict[str, Any] = {}
    position = 0
    for number in range(count // (len(PROJECTIONS) * len(SUFFIXES))):
        for name, (n, k) in PROJECTIONS.items():
            for suffix, (dtype, width, shape) in SUFFIXES.items():
                size = width
                for dimension in shape(n, k):
                    size *= dimension
                path = f"model.layers.{number // 128}.mlp.experts.{number % 128}.{name}.{suffix}"
                header[path] = {"dtype": dtype, "shape": shape(n, k), "data_offsets": [position, position + size]}
                position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral", "quantization_config": config}))


def measure(runs: int = 5) -> dict[str, Any]:
    """Plan for the CPU several times and return the median."""
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        wall, cpu = [], []
        for _ in range(runs):
            started = time.perf_counter(), time.process_time()
            made = quantplug.plan(name, platform="cpu")
            wall.append(time.perf_counter() - started[0])
            cpu.append(time.process_time() - started[1])
    return {
        "tensors": TENSORS,
        "layers": len(made.layers),
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
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
            f"{result['tensors']:,} tensors, {result['layers']:,} layers: {result['seconds']:.2f} s "
            f"({result['cpu_seconds']:.2f} s of CPU)"
        )


if __name__ == "__main__":
    main()
