"""
`quantplug run`: load a checkpoint and let it answer.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug_cli.options import (
    AsJson,
    Checkpoint,
    Dtype,
    LayoutBudget,
    PolicyFile,
    Quantize,
    Settings,
    Skip,
    Strict,
    read_policy,
    read_settings,
)

if TYPE_CHECKING:
    from quantplug.host import RunningModel
    from quantplug.jsonio import Json

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after this many tokens at the latest.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
_KIB = 1024


def run(
    checkpoint: Checkpoint,
    *,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 128,
    raw: Raw = False,
    dtype: Dtype = None,
    policy: PolicyFile = None,
    layout_budget: LayoutBudget = None,
    quantize: Quantize = None,
    skip: Skip = None,
    settings: Settings = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Generate greedily and stream the text; then show speed, load time, peak memory and the kernels used."""
    import quantplug
    from quantplug_cli.progress import bar

    started = time.perf_counter()
    with bar() as progress:
        running = quantplug.load(
            checkpoint,
            dtype=dtype,
            policy=read_policy(policy, layout_budget),
            override=read_settings(settings) or None,
            quantize=quantize,
            skip=skip or (),
            strict=strict,
            progress=progress,
        )
    loaded = time.perf_counter()
    pieces: list[str] = []
    times: list[float] = []
    for piece in running.stream(prompt, max_new_tokens=max_new_tokens, chat=not raw):
        times.append(time.perf_counter())
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    facts = _facts(running, loaded - started, [t - loaded for t in times])
    if as_json:
        import json

        typer.echo(json.dumps({"text": "".join(pieces), **facts}, indent=2))
        return
    from quantplug_cli.text import size

    rate = f"{facts['tokens_per_second']:.1f} tokens/s" if facts["tokens_per_second"] else "too short to time"
    typer.echo("\n")
    typer.secho(
        f"{facts['tokens']} tokens, {rate} (first after {facts['first_token_seconds']:.2f} s), loaded in "
        f"{facts['load_seconds']:.1f} s, peak memory {size(float(str(facts['peak_memory_bytes'])))}, kernels "
        + (", ".join(f"{name} x {count}" for name, count in _kernels(running).items()) or "the framework's own"),
        dim=True,
    )


def _facts(running: RunningModel, load_seconds: float, times: list[float]) -> dict[str, Json]:
    import resource

    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return {
        "tokens": len(times),
        "tokens_per_second": rate,
        "first_token_seconds": times[0] if times else None,
        "load_seconds": load_seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB,
        "kernels": dict(_kernels(running)),
        "plan": running.plan.hash,
    }


def _kernels(running: RunningModel) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in running.plan.layers:
        decision = running.plan.decision_of(layer)
        if decision is not None:
            for choice in decision.choices:
                counts[choice.kernel] = counts.get(choice.kernel, 0) + 1
    return counts
