"""
How long it takes to read and check the headers of a large checkpoint: `python benchmarks/headers.py [--json]`.

Builds a synthetic checkpoint with the tensor names of a mixture-of-experts model, once as a single file and once as
shards with an index. The data are holes in sparse files: they take no space and are never read.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantplug.checkpoint import INDEX_FILE, open_checkpoint

HIDDEN, INNER, GROUP = 2048, 1024, 128
EXPERTS = 128
SHARDS = 20
# One 4-bit projection: suffix, dtype, bytes per element, shape.
STORED = (
    ("g_idx", "I32", 4, (HIDDEN,)),
    ("qweight", "I32", 4, (HIDDEN // 8, INNER)),
    ("qzeros", "I32", 4, (HIDDEN // GROUP, INNER // 8)),
    ("scales", "F16", 2, (HIDDEN // GROUP, INNER)),
)


def tensors(count: int) -> list[tuple[str, str, int, tuple[int, ...]]]:
    """Return name, dtype, bytes and shape of `count` tensors."""
    found: list[tuple[str, str, int, tuple[int, ...]]] = []
    layer = 0
    while len(found) < count:
        for expert in range(EXPERTS):
            for projection in ("down_proj", "gate_proj", "up_proj"):
                path = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                for suffix, dtype, width, shape in STORED:
                    size = width
                    for dimension in shape:
                        size *= dimension
                    found.append((f"{path}.{suffix}", dtype, size, shape))
        layer += 1
    return found[:count]


def write(path: Path, entries: list[tuple[str, str, int, tuple[int, ...]]]) -> int:
    """Write one sparse safetensors file and return the bytes of its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, size, shape in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)
    return len(text)


def build(directory: Path, count: int, shards: int) -> int:
    """Write a checkpoint and return the bytes of JSON a reader has to parse."""
    directory.mkdir()
    entries = tensors(count)
    if shards == 1:
        return write(directory / "model.safetensors", entries)
    weight_map: dict[str, str] = {}
    parsed = 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = entries[number * count // shards : (number + 1) * count // shards]
        parsed += write(directory / file, part)
        weight_map |= dict.fromkeys((name for name, *_ in part), file)
    total = sum(size for _, _, size, _ in entries)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    return parsed + (directory / INDEX_FILE).write_text(index)


def measure(directory: Path, count: int, runs: int) -> tuple[list[float], list[float]]:
    """
    Return the seconds of each of `runs` openings, after one that is not counted: by the clock, and of the processor.

    On a machine that others use, too, the second is the one to compare.
    """
    wall, cpu = [], []
    for _ in range(runs + 1):
        gc.collect()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        checkpoint = open_checkpoint(directory)
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
        if len(checkpoint.tensors) != count or checkpoint.warnings:
            raise SystemExit(f"{directory} was not read whole: {checkpoint.warnings}")
    return wall[1:], cpu[1:]


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for shards in (1, SHARDS):
            directory = Path(scratch, f"{shards}-files")
            parsed = build(directory, options.tensors, shards)
            wall, cpu = measure(directory, options.tensors, options.runs)
            results.append(
                {
                    "files": shards,
                    "tensors": options.tensors,
                    "json_bytes": parsed,
                    "median_s": round(statistics.median(wall), 4),
                    "min_s": round(min(wall), 4),
                    "max_s": round(max(wall), 4),
                    "median_cpu_s": round(statistics.median(cpu), 4),
                }
            )
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    if options.json:
        json.dump({"benchmark": "headers", "runs": options.runs, **machine, "results": results}, sys.stdout)
        print()
        return
    print(f"Python {machine['python']}, {machine['machine']}, {machine['cpus']} CPUs, median of {options.runs}")
    heads = f"{'files':>6} {'tensors':>9} {'JSON MB':>8} {'median s':>9} {'min s':>7} {'max s':>7}"
    print(f"{heads} {'cpu s':>7} {'cpu us/tensor':>14}")
    for row in results:
        print(
            f"{row['files']:>6} {row['tensors']:>9,} {row['json_bytes'] / 1e6:>8.1f} {row['median_s']:>9.3f} "
            f"{row['min_s']:>7.3f} {row['max_s']:>7.3f} {row['median_cpu_s']:>7.3f} "
            f"{row['median_cpu_s'] / row['tensors'] * 1e6:>14.2f}"
        )


if __name__ == "__main__":
    main()
