"""
How long the first moments take: `import quantplug`, discovery of 50 plugins, `quantplug plugins`.

Run: python benchmarks/discovery.py [--plugins 50] [--runs 15] [--json]

Every figure is the median over fresh processes with warm byte code. The 50 plugins are synthetic distributions in a
temporary directory, laid out as pip installs them; each has a package, a plugin.py and a scheme of its own, which its
hook imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
start = time.perf_counter()
import quantplug
imported = time.perf_counter()
import quantplug.plugins
ready = time.perf_counter()
found = quantplug.plugins.discover({path}, environ={{}})
done = time.perf_counter()
if (len(found.plugins), found.failures, "torch" in sys.modules) != ({count}, (), False):
    sys.exit(f"not the plugins that were made, or torch was imported: {{found}}")
print(imported - start, ready - imported, done - ready)
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


def process(command: list[str], environ: dict[str, str]) -> tuple[float, str]:
    """Run a command; return its wall time in seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return time.perf_counter() - start, done.stdout


def measure(plugins: int, runs: int) -> dict[str, float]:
    """Return the medians in milliseconds."""
    samples: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        samples.setdefault(name, []).append(seconds * 1000)

    script = Path(sys.executable).with_name("quantplug")
    command = str(script) if script.exists() else shutil.which("quantplug")
    with tempfile.TemporaryDirectory() as place:
        install(Path(place), plugins)
        crowded = {**os.environ, "PYTHONPATH": place}
        discover = DISCOVER.format(path=[place], count=plugins)
        for run in range(runs + 1):
            figures = {
                "python, nothing": process([sys.executable, "-c", ""], crowded)[0],
                "python, import quantplug": process([sys.executable, "-c", "import quantplug"], crowded)[0],
            }
            parts = process([sys.executable, "-c", discover], crowded)[1].split()
            figures["import quantplug"], figures["import quantplug.plugins"] = float(parts[0]), float(parts[1])
            figures[f"discover {plugins} plugins"] = float(parts[2])
            if command is not None:
                figures["quantplug plugins"] = process([command, "plugins"], dict(os.environ))[0]
                figures[f"quantplug plugins, {plugins} more"] = process([command, "plugins"], crowded)[0]
            if run:  # the first one writes byte code
                for name, seconds in figures.items():
                    note(name, seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


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
    print(f"{'median of ' + str(options.runs) + ' fresh processes':36} {'ms':>8} {'target':>8}")
    for name, value in medians.items():
        print(f"{name:36} {value:8.1f} {targets.get(name, ''):>8}")


if __name__ == "__main__":
    main()
