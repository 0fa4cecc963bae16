"""
quantplug: quantized checkpoints on any hardware, through plugins, with every decision readable before a weight is read.

What is public here is imported when it is first used, so that `import quantplug` costs next to nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantplug.api import load as load
    from quantplug.config import resolve_config as resolve_config
    from quantplug.convert import convert as convert
    from quantplug.detect import detect as detect
    from quantplug.draft import Draft as Draft
    from quantplug.errors import QuantplugError as QuantplugError
    from quantplug.hooks import hookimpl as hookimpl
    from quantplug.lint import lint as lint
    from quantplug.load import load_layers as load_layers
    from quantplug.plan import Plan as Plan
    from quantplug.planner import plan as plan
    from quantplug.platform import Platform as Platform
    from quantplug.plugins import registry as registry
    from quantplug.registry import Registry as Registry

    __version__: str

_HOMES = {
    "Draft": "draft",
    "Plan": "plan",
    "Platform": "platform",
    "QuantplugError": "errors",
    "Registry": "registry",
    "convert": "convert",
    "detect": "detect",
    "hookimpl": "hooks",
    "lint": "lint",
    "load": "api",
    "load_layers": "load",
    "plan": "planner",
    "registry": "plugins",
    "resolve_config": "config",
}
"""Public name -> the module it lives in."""

__all__ = [
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
]


class _Package(ModuleType):
    """
    The package, in which `load`, `plan`, `detect`, `convert`, `lint` and `registry` are functions, always.

    They share their names with submodules, which the import system would put in their place as soon as one is
    imported. The submodules themselves are reached as `from quantplug.plan import Plan`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("quantplug-core")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(f"quantplug.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'quantplug' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


sys.modules[__name__].__class__ = _Package
