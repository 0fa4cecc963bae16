"""
Measure one checkpoint in a process of its own: load time, speed, peak memory, perplexity. Prints JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path

PROMPT = "Explain in a few sentences why the sky is blue during the day and red at sunset."
NEW_TOKENS = 96
RUNS = 3


def main(checkpoint: str, text: Path) -> None:
    """Load the checkpoint through quantplug, decode greedily three times, then score the text."""
    import torch

    import quantplug

    torch.set_num_threads(min(torch.get_num_threads(), 2))
    started = time.perf_counter()
    running = quantplug.load(checkpoint)
    load_seconds = time.perf_counter() - started
    rates = []
    for _ in range(RUNS):
        times = []
        for _piece in running.stream(PROMPT, max_new_tokens=NEW_TOKENS):
            times.append(time.perf_counter())
        rates.append((len(times) - 1) / (times[-1] - times[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "load_seconds": load_seconds,
        "tokens_per_second": statistics.median(rates),
        "peak_bytes": peak,
        "disk_bytes": sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors")),
        "perplexity": running.perplexity(text.read_text(encoding="utf-8")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
