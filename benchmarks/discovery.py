"""
How long the first moments take: `import quantplug`, discovery of 50 plugins, `quantplug plugins`.

Run: python benchmarks/discovery.py [--plugins 50] [--runs 15] [--json]

Every figure is the median over fresh processes with warm byte code: wall time, and the processor time within it, which
is what remains on a machine that is busy with other things. The 50 plugins are synthetic distributions in a
temporary directory, laid out as pip installs them; each has a package, a plugin.py and a scheme of its own, which its
hook imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Times = tuple[float, float]
"""Wall and processor time."""

PLUGIN = """
from quantplug.hooks import hookimpl

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_schemes():
    from {package}.scheme import Scheme

    return [Scheme]
"""

SCHEME = """
from quantplug.scheme import LinearScheme


def no(*args):
    raise NotImplementedError


Scheme = type("Scheme", (LinearScheme,), dict.fromkeys(LinearScheme.__abstractmethods__, no) | {{"name": "{name}"}})
"""

DISCOVER = """
import sys, time
def now():
    return time.perf_counter(), time.process_time()
start = now()
import quantplug
imported = now()
import quantplug.plugins
ready = now()
found = quantplug.plugins.discover({path}, environ={{}})
done = now()
if (len(found.plugins), found.failures, "torch" in sys.modules) != ({count}, (), False):
    sys.exit(f"not the plugins that were made, or torch was imported: {{found}}")
stages = (start, imported), (imported, ready), (ready, done)
print(*[after - before for first, second in stages for before, after in zip(first, second)])
"""


def install(directory: Path, count: int) -> None:
    """Write `count` distributions with one plugin each."""
    for number in range(count):
        name = f"synthetic-{number:03}"
        package = name.replace("-", "_")
        source = directory / package
        info = directory / f"{package}-1.0.dist-info"
        source.mkdir()
        info.mkdir()
        (source / "__init__.py").touch()
        (source / "plugin.py").write_text(PLUGIN.format(package=package))
        (source / "scheme.py").write_text(SCHEME.format(name=name))
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[quantplug.plugins]\n{name} = {package}.plugin\n")


def cpu() -> float:
    """Return the processor seconds of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process(command: list[str], environ: dict[str, str]) -> tuple[Times, str]:
    """Run a command; return its times in seconds and what it printed."""
    used, start = cpu(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return (time.perf_counter() - start, cpu() - used), done.stdout


def measure(plugins: int, runs: int) -> dict[str, dict[str, float]]:
    """Return the median wall and processor times in milliseconds."""
    samples: dict[str, list[Times]] = {}
    script = Path(sys.executable).with_name("quantplug")
    command = str(script) if script.exists() else shutil.which("quantplug")
    with tempfile.TemporaryDirectory() as place:
        install(Path(place), plugins)
        # pip compiles what it installs. A checkout's byte code is kept here, also where nobody else may write any.
        usual = {**os.environ, "PYTHONPYCACHEPREFIX": str(Path(place, "byte code"))}
        usual.pop("PYTHONDONTWRITEBYTECODE", None)
        crowded = {**usual, "PYTHONPATH": place}
        discover = DISCOVER.format(path=[place], count=plugins)
        for run in range(runs + 1):
            figures = {
                "python, nothing": process([sys.executable, "-c", ""], crowded)[0],
                "python, import quantplug": process([sys.executable, "-c", "import quantplug"], crowded)[0],
            }
            parts = [float(part) for part in process([sys.executable, "-c", discover], crowded)[1].split()]
            figures["import quantplug"] = parts[0], parts[1]
            figures["import quantplug.plugins"] = parts[2], parts[3]
            figures[f"discover {plugins} plugins"] = parts[4], parts[5]
            if command is not None:
                figures["quantplug plugins"] = process([command, "plugins"], usual)[0]
                figures[f"quantplug plugins, {plugins} more"] = process([command, "plugins"], crowded)[0]
            if run:  # the first one writes byte code
                for name, times in figures.items():
                    samples.setdefault(name, []).append(times)
    return {
        name: {
            kind: statistics.median(part) * 1000
            for kind, part in zip(("wall", "cpu"), zip(*times, strict=True), strict=True)
        }
        for name, times in samples.items()
    }


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--plugins", type=int, default=50)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    medians = measure(options.plugins, options.runs)
    if options.json:
        print(json.dumps({"runs": options.runs, "milliseconds": medians}, indent=2))
        return
    targets = {
        "import quantplug": 100.0,
        f"discover {options.plugins} plugins": float(options.plugins),
        "quantplug plugins": 400.0,
    }
    print(f"{'median of ' + str(options.runs) + ' fresh processes':36} {'wall ms':>8} {'cpu ms':>8} {'target':>8}")
    for name, times in medians.items():
        print(f"{name:36} {times['wall']:8.1f} {times['cpu']:8.1f} {targets.get(name, ''):>8}")


if __name__ == "__main__":
    main()
