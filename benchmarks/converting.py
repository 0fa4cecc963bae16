"""
Converting a dense checkpoint: `python -m benchmarks.converting [--json] [--gigabytes 4] [--recipe int4-g64 …]`.

A synthetic BF16 checkpoint, larger than what a conversion may hold, is converted in a process of its own. Its peak
memory over that of the idle process stands beside what is allowed, three times the largest tensor and 300 MB; its
speed, in MB/s of source bytes, beside that of merely copying the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading import BLOCK, MEGABYTE, status
from benchmarks.machine import describe
from quantplug.writer import TensorFileWriter

ALLOWANCE = 300 * MEGABYTE
RECIPES = ("int4-g64", "fp8", "mxfp8", "nvfp4")


def write_dense(directory: Path, gigabytes: float) -> int:
    """Write a BF16 checkpoint of about that size, one tensor at a time, and return the bytes of its largest tensor."""
    block = sum(n * k * 2 for n, k in BLOCK.values())
    shapes = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(max(1, round(gigabytes * 1e9 / block)))
        for name, shape in BLOCK.items()
    }
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    outputs = [(name, "bfloat16", shape) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    # One random tensor per shape: what is converted takes as long whether or not it was seen before.
    values = {shape: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16) for shape in BLOCK.values()}
    with TensorFileWriter(directory / "model.safetensors", outputs, {"format": "pt"}) as writer:
        for name, _, shape in outputs:
            writer.write(name, values[shape])
    return max(value.nbytes for value in values.values())


def convert_here(source: str, destination: str, recipe: str) -> dict[str, float]:
    """Convert in this process and return how long it took and how much memory it needed."""
    import quantplug

    found = quantplug.registry().recipe(recipe).item
    torch.zeros(1).add_(1)  # whatever torch sets up at its first use is not the conversion's
    before = status("VmRSS")
    started = time.perf_counter()
    quantplug.convert(source, destination, scheme=found.scheme, params=found.params)
    return {"seconds": time.perf_counter() - started, "peak_bytes": status("VmHWM") - before}


def measure(gigabytes: float, recipes: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of every recipe."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "dense"
        source.mkdir()
        largest = write_dense(source, gigabytes)
        size = (source / "model.safetensors").stat().st_size
        for recipe in recipes:
            target = Path(name) / recipe
            command = [sys.executable, "-m", "benchmarks.converting", "--convert", str(source), str(target), recipe]
            figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            written = (target / "model.safetensors").stat().st_size
            for file in target.iterdir():
                file.unlink()
            results.append({"recipe": recipe, "written_bytes": written, **figures})
        copied = Path(name) / "copy"
        started = time.perf_counter()
        subprocess.run(["cp", str(source / "model.safetensors"), str(copied)], check=True)
        copying = time.perf_counter() - started
    return {
        "machine": describe(),
        "source_bytes": size,
        "largest_tensor_bytes": largest,
        "allowed_bytes": 3 * largest + ALLOWANCE,
        "copy_seconds": copying,
        "recipes": results,
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        print(json.dumps(convert_here(*options.convert)))
        return
    result = measure(options.gigabytes, tuple(options.recipe))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    size, allowed = result["source_bytes"] / MEGABYTE, result["allowed_bytes"] / MEGABYTE
    print(
        f"source {size:.0f} MB, largest tensor {result['largest_tensor_bytes'] / MEGABYTE:.0f} MB, "
        f"copying it {size / result['copy_seconds']:.0f} MB/s"
    )
    for figures in result["recipes"]:
        print(
            f"{figures['recipe']:10} {size / figures['seconds']:6.0f} MB/s  "
            f"written {figures['written_bytes'] / MEGABYTE:6.0f} MB  "
            f"peak {figures['peak_bytes'] / MEGABYTE:6.0f} MB (allowed {allowed:.0f})"
        )


if __name__ == "__main__":
    main()
