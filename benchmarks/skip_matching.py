"""
How long skip matching takes: `python benchmarks/skip_matching.py [--json]`.

Four tables: modules x literal rules (linear in their sum, not in their product), time of one expression per name,
refusing hostile expressions, and the largest lists that are accepted. Reading the entries, building the index,
deciding every module and the report are all in the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from quantplug.entries import path_entries
from quantplug.errors import ConfigError
from quantplug.inventory import ModuleInfo
from quantplug.matcher import Matcher
from quantplug.patterns import MAX_NAME, examine, vet
from quantplug.skip import Rule, SchemeRef

if TYPE_CHECKING:
    from collections.abc import Callable

Row: TypeAlias = "dict[str, float | str]"

DEFAULT = SchemeRef("scheme", (("bits", 4), ("group_size", 128)))
EXPERTS = 128
GRID = ((25_000, 1_000), (50_000, 1_000), (100_000, 1_000), (100_000, 10), (100_000, 10_000), (100_000, 100_000))
EXPRESSIONS = (
    r".*self_attn.*",
    r".*\.[qkv]_proj$",
    r".*\.(?:1[0-5])\..*",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r"^(?!.*lm_head).*$",
    r".*layers.*mlp.*experts.*down_proj.*",
    r"model\.layers\.[0-9]\.self_attn\.(q|k|v|o)_proj",
)
HOSTILE = (
    r"model.*\.(a+)+$",
    r"(([a-z_0-9])+\.?)+X$",
    r"(.*)*X",
    r"(a|a)*b",
    r"(a?){25}a{25}",
    r"(a)\1",
)


def module_names(count: int) -> list[str]:
    """Return names as a mixture-of-experts model has them."""
    names: list[str] = []
    layer = 0
    while len(names) < count:
        names += [f"model.layers.{layer}.self_attn.{letter}_proj" for letter in "qkvo"]
        names += [
            f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
            for expert in range(EXPERTS)
            for projection in ("gate", "up", "down")
        ]
        layer += 1
    return names[:count]


def rule_texts(names: list[str], count: int) -> list[str]:
    """Return full paths, last components, parents and paths that no module has, in equal parts."""
    texts = []
    for number in range(count):
        name = names[number * 7919 % len(names)]
        parts = name.split(".")
        texts.append((name, ".".join(parts[-2:]), f"{'.'.join(parts[:-1])}.", f"{name}.{number}")[number % 4])
    return texts


def measure(action: Callable[[], object], runs: int) -> dict[str, float]:
    """Return median, least and greatest seconds by the clock, and the median of processor seconds."""
    wall, cpu = [], []
    for _ in range(runs):
        gc.collect()
        started, worked = time.perf_counter(), time.process_time()
        action()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - worked)
    return {
        "median_s": statistics.median(wall),
        "min_s": min(wall),
        "max_s": max(wall),
        "median_cpu_s": statistics.median(cpu),
    }


def whole(modules: list[ModuleInfo], texts: list[str]) -> None:
    """Read, index, decide and report."""
    matcher = Matcher([Rule(entry) for entry in path_entries(texts, "list")], DEFAULT)
    for module in modules:
        matcher.decide(module)
    matcher.report()


def literals(runs: int) -> list[Row]:
    """Measure the grid of modules and literal rules."""
    rows: list[Row] = []
    for modules, rules in GRID:
        names = module_names(modules)
        infos = [ModuleInfo(name, "linear") for name in names]
        texts = rule_texts(names, rules)
        found = measure(partial(whole, infos, texts), runs)
        per_item = found["median_cpu_s"] / (modules + rules) * 1e6
        rows.append({"modules": modules, "rules": rules, **found, "cpu_us_per_item": per_item})
    return rows


def expressions(runs: int) -> list[Row]:
    """Measure one `re:` rule at a time over 100,000 names."""
    names = module_names(100_000)
    infos = [ModuleInfo(name, "linear") for name in names]
    nothing = measure(partial(whole, infos, []), runs)["median_cpu_s"]
    rows: list[Row] = []
    for text in EXPRESSIONS:
        found = measure(partial(whole, infos, [f"re:{text}"]), runs)
        extra = max(found["median_cpu_s"] - nothing, 0.0)
        steps = examine(text, "list").steps
        rows.append({"expression": text, "steps": steps, **found, "cpu_us_per_name": extra / len(names) * 1e6})
    return rows


def refusals(runs: int) -> list[Row]:
    """Measure refusing each hostile expression."""

    def refuse(text: str) -> None:
        try:
            vet(text, "list")
        except ConfigError:
            return
        raise SystemExit(f"{text} was accepted")

    return [{"expression": text, **measure(partial(refuse, text), max(runs, 20))} for text in HOSTILE]


def limits(runs: int) -> list[Row]:
    """Measure the largest lists that are accepted: a million paths, and 4,096 expressions, on 46,080 modules."""
    names = module_names(46_080)
    infos = [ModuleInfo(name, "linear") for name in names]
    paths = [f"model.layers.{n // 1000}.mlp.experts.{n % 1000}.x" for n in range(1_000_000)]
    layers = [rf"re:model\.layers\.{n // 64}\.mlp\.experts\.{n % 64}\.(gate|up)_proj" for n in range(4_096)]
    return [
        {"list": "1,000,000 paths", **measure(partial(whole, infos, paths), runs)},
        {"list": "4,096 expressions that begin with a path", **measure(partial(whole, infos, layers), runs)},
    ]


def table(heading: str, rows: list[Row], columns: dict[str, str]) -> None:
    """Print chosen columns, each by its format."""
    print(f"\n{heading}")
    print("  ".join(f"{name:>{len(format(rows[0][name], form))}}" for name, form in columns.items()))
    for row in rows:
        print("  ".join(f"{format(row[name], form):>{len(name)}}" for name, form in columns.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--runs", type=int, default=5, help="repetitions of each measurement")
    options = parser.parse_args()
    results: dict[str, list[Row]] = {
        "literals": literals(options.runs),
        "expressions": expressions(options.runs),
        "refusals": refusals(options.runs),
        "limits": limits(min(options.runs, 3)),
    }
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    if options.json:
        json.dump({"benchmark": "skip_matching", "runs": options.runs, **machine, **results}, sys.stdout)
        print()
        return
    print(f"Python {machine['python']}, {machine['machine']}, {machine['cpus']} CPUs, median of {options.runs}")
    seconds = {"median_s": "9.3f", "min_s": "7.3f", "max_s": "7.3f", "median_cpu_s": "7.3f"}
    table(
        "Literal rules: time grows with modules + rules (a rule costs more than a module), not with their product",
        results["literals"],
        {"modules": "9,d", "rules": "9,d", **seconds, "cpu_us_per_item": "7.2f"},
    )
    table(
        f"One expression over 100,000 names (steps: its bound on a name of {MAX_NAME} characters)",
        results["expressions"],
        {"expression": "<52", "steps": "10,d", **seconds, "cpu_us_per_name": "7.2f"},
    )
    table("Refusing a hostile expression", results["refusals"], {"expression": "<26", "median_s": "9.6f"})
    table("Largest lists, on 46,080 modules", results["limits"], {"list": "<42", **seconds})


if __name__ == "__main__":
    main()
