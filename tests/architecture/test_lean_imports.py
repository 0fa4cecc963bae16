"""
What is imported when: nothing heavy before it is needed, in fresh interpreters.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sources import projects

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub")

NEEDS_TORCH = {
    "codes", "convert", "cudacalls", "dispatch", "expertfunction", "expertinputs", "expertload", "expertrowprepare",
    "lintscales", "load", "modules", "moemodules", "preparedmodule", "reader", "rowprepare", "samples", "seen",
    "stopwatch", "trial", "trialbound", "trialexperts", "weight", "workers", "writeback", "writer",
}  # fmt: skip
"""Modules of the core that handle tensors; all others, planning included, work on a machine without torch."""

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this test", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> object:
    """Run code in a fresh interpreter; return what it prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a statement makes Python load."""
    before = "import sys, json; before = set(sys.modules)\n"
    after = "\nprint(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    return set(run(before + code + after))


def test_importing_quantplug_imports_nothing_but_the_standard_library():
    assert loaded_by("import quantplug") - set(sys.stdlib_module_names) == {"quantplug"}


def test_discovery_imports_nothing_heavy():
    assert loaded_by("import quantplug; quantplug.registry()").isdisjoint(HEAVY)


def test_detecting_the_processor_imports_nothing_heavy():
    assert loaded_by("import quantplug; quantplug.detect(kind='cpu')").isdisjoint(HEAVY)


@pytest.mark.parametrize("module", [module for project in projects() for module in project.plugin_modules])
def test_a_plugin_module_imports_nothing_heavy(module):
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


def test_discovery_works_on_a_machine_without_torch_or_any_framework():
    """Every plugin.py and whatever its hooks import: schemes, dialects, kernels, hosts."""
    block = BLOCK.format(blocked={"torch", "transformers", "numpy"})
    code = "import json, quantplug; print(json.dumps([str(failure) for failure in quantplug.registry().failures]))"
    assert run(block + code) == []


def test_the_core_plans_without_torch():
    """The modules of the core that handle tensors are these; all others import where there is no torch."""
    [core] = [project for project in projects() if project.package == "quantplug"]
    code = f"""
import importlib, json
failed = {{}}
for module in {[file.stem for file in core.sources if file.stem != "__init__"]!r}:
    try:
        importlib.import_module(f"quantplug.{{module}}")
    except ImportError as error:
        failed[module] = str(error)
print(json.dumps(failed))
"""
    blocked = "torch is blocked in this test"
    assert run(BLOCK.format(blocked={"torch", "numpy"}) + code) == dict.fromkeys(sorted(NEEDS_TORCH), blocked)
