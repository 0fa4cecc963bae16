"""
Greedy decoding of the demo model, 4-bit against Transformers' BF16, in one run: `python -m benchmarks.decode [--json]`.

Needs the two checkpoints that `make demo` leaves in its cache. All variants live in one process and take turns, so that
a ratio compares neighbours in time; `--profile` shows where the microseconds of one decode step go.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from examples.demo.demo import DENSE, QUANTIZED

from benchmarks.machine import describe, read_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 22, 48, 5
BASELINE = "transformers BF16 eager"


def dense() -> Any:
    """Load the BF16 model with Transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.bfloat16).eval()


def quantized() -> Any:
    """Load the 4-bit model through quantplug."""
    from quantplug_transformers import from_pretrained

    return from_pretrained(QUANTIZED).eval()


def compiled(model: Any) -> Any:
    """Compile a model's forward in place; `generate` then needs a static cache."""
    model.forward = torch.compile(model.forward, fullgraph=True)
    return model


def decode_seconds(model: Any, prompt: torch.Tensor, *, static: bool) -> float:
    """Return seconds per decoded token: a long generation less one that stops after the first token."""
    cache = {"cache_implementation": "static", "disable_compile": True} if static else {}

    def generate(count: int) -> float:
        started = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=count, max_new_tokens=count,
            **cache,
        )  # fmt: skip
        return time.perf_counter() - started

    first = generate(1)
    return (generate(1 + NEW_TOKENS) - first) / NEW_TOKENS


def step_bytes(model: Any) -> int:
    """Return the weight bytes that one decoded token reads: everything but the embedding, of which it reads one row."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    total = sum(tensor.nbytes for tensor in tensors.values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding
    return total if tied else total - embedding.nbytes


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Time every variant in turns and return medians, ratios and floors."""
    warnings.filterwarnings("ignore")
    variants: dict[str, tuple[Callable[[], Any], bool]] = {
        BASELINE: (dense, False),
        "quantplug 4-bit eager": (quantized, False),
        "transformers BF16 compiled": (lambda: compiled(dense()), True),
        "quantplug 4-bit compiled": (lambda: compiled(quantized()), True),
    }
    prompt = torch.arange(100, 100 + PROMPT_TOKENS)[None]
    models = {name: (make(), static) for name, (make, static) in variants.items()}
    for model, static in models.values():
        decode_seconds(model, prompt, static=static)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, (model, static) in models.items():
            seconds[name].append(decode_seconds(model, prompt, static=static))
    bandwidth = read_bandwidth()
    rows = {
        name: {
            "tokens_per_second": 1 / statistics.median(times),
            "ratio": statistics.median(b / a for a, b in zip(times, seconds[BASELINE], strict=True)),
            "weight_bytes": step_bytes(models[name][0]),
            "floor_tokens_per_second": bandwidth / step_bytes(models[name][0]),
        }
        for name, times in seconds.items()
    }
    return {"machine": describe(), "read_bandwidth": bandwidth, "variants": rows}


def profile() -> str:
    """Return where one eager decode step of the 4-bit model spends its time, by operator."""
    model = quantized()
    prompt = torch.arange(100, 100 + PROMPT_TOKENS)[None]
    cache = model(prompt, use_cache=True).past_key_values
    token = prompt[:, -1:]
    with torch.inference_mode():
        for _ in range(5):
            model(token, past_key_values=cache, use_cache=True)
        with torch.profiler.profile() as recorded:
            for _ in range(20):
                model(token, past_key_values=cache, use_cache=True)
    return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    if not QUANTIZED.exists():
        raise SystemExit("run `make demo` first: it makes the checkpoints")
    if options.profile:
        print(profile())
        return
    result = measure(options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['machine']}, reads {result['read_bandwidth'] / 1e9:.1f} GB/s")
    print(f"{'':<30}{'tokens/s':>10}{'x BF16':>9}{'MB a token':>12}{'floor':>9}")
    for name, row in result["variants"].items():
        print(
            f"{name:<30}{row['tokens_per_second']:>10.1f}{row['ratio']:>9.2f}{row['weight_bytes'] / 1e6:>12.0f}"
            f"{row['floor_tokens_per_second']:>9.0f}"
        )


if __name__ == "__main__":
    main()
