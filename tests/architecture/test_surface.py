"""
The public surface of the core: a change of this list is a decision, not an accident.
"""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import quantplug
from quantplug import _HOMES

SURFACE = {
    "Draft",
    "Plan",
    "Platform",
    "QuantplugError",
    "Registry",
    "__version__",
    "convert",
    "detect",
    "hookimpl",
    "lint",
    "load",
    "load_layers",
    "plan",
    "registry",
    "resolve_config",
}


def test_the_public_surface_is_this_and_nothing_else():
    assert set(quantplug.__all__) == SURFACE
    assert set(dir(quantplug)) == SURFACE
    assert {*_HOMES, "__version__"} == SURFACE


@pytest.mark.parametrize("name", sorted(SURFACE - {"__version__"}))
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(quantplug, name)
    assert not inspect.ismodule(thing)
    assert name == "hookimpl" or thing.__doc__


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert quantplug.__version__ == version("quantplug-core")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'quantplug' has no attribute 'lod'"):
        _ = quantplug.lod


EARLY = "import quantplug.detect, quantplug.registry, quantplug.plan, quantplug.load, quantplug.lint"


@pytest.mark.parametrize("early", ["", EARLY])
def test_a_function_is_not_replaced_by_the_submodule_of_its_name(early):
    """Whichever is asked for first, `quantplug.load` is the function and `quantplug.load` imports as a module."""
    code = f"""
import quantplug
{early}
names = ["detect", "registry", "plan", "load", "convert", "lint"]
first = [getattr(quantplug, name) for name in names]
from quantplug.detect import survey
from quantplug.plan import Plan
from quantplug.load import load_layers
from quantplug import detect
assert detect is first[0]
assert first == [getattr(quantplug, name) for name in names]
print(*[type(thing).__name__ for thing in first])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["function"] * 6, done.stderr
