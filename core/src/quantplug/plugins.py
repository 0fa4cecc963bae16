"""
Discovery: from what is installed to one frozen `Registry`, whatever a plugin does wrong.

Each plugin goes through the same stages (metadata, api, import, hooks, call) and is registered in full or not at all;
where it stops becomes a `PluginFailure`, and the others never notice. Nothing depends on the order of the import path.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import threading
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from quantplug.allowlist import AllowList
from quantplug.assembly import Loaded, assemble
from quantplug.distributions import find_distributions, normalise
from quantplug.errors import PluginError
from quantplug.hooks import API_VERSION, GROUP
from quantplug.isolation import Fault, isolated
from quantplug.offers import collect, register
from quantplug.registry import PluginFailure, PluginInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.distributions import Distribution, EntryPoint
    from quantplug.registry import Registry, Stage

_VALUE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)\s*(:\s*(?P<attribute>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*))?")
_API = re.compile(r"""^quantplug_api\s*(?::[^=\n]*)?=\s*(["'])(?P<range>[^"'\n]*)\1""", re.MULTILINE)
_API_FIX = "Install a version of the plugin, or of quantplug-core, so that the two agree"

_lock = threading.RLock()
_installed: Registry | None = None
_building = False


def registry() -> Registry:
    """
    Return what is installed in this process, discovered at the first call and the same value ever after.

    Raises:
        PluginError: what `discover` raises; `QP-PLUG-CALL` when a plugin asks while it is itself being discovered.

    """
    global _building, _installed
    with _lock:
        if _building:
            raise PluginError(
                "QP-PLUG-CALL",
                "quantplug.registry()",
                "called by a plugin while plugins are being discovered",
                fix="Ask for it where it is used, not while the plugin is imported",
            )
        if _installed is None:
            _building = True
            try:
                _installed = discover()
            finally:
                _building = False
        return _installed


def discover(path: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None) -> Registry:
    """
    Find the installed plugins, import and ask them, and return what they offer.

    Args:
        path: directories to look for installed distributions in, None for `sys.path`; modules are imported from
            `sys.path` in any case.
        environ: where `QUANTPLUG_PLUGINS`, `QUANTPLUG_DISABLE_PLUGINS` and `QUANTPLUG_STRICT` are looked up, None for
            the process environment.

    Raises:
        PluginError: `QP-PLUG-ALLOW` when `QUANTPLUG_PLUGINS` names what is not installed, `QP-PLUG-CONFLICT` when one
            of the two lists names an entry point of several distributions, `QP-PLUG-STRICT` when there is any
            failure and `QUANTPLUG_STRICT=1` asks for an error.

    """
    environ = os.environ if environ is None else environ
    distributions, failures = find_distributions(sys.path if path is None else path)
    wanted = AllowList.read(environ, distributions, failures)
    failures = [failure for failure in failures if not wanted.verdict(failure.distribution, failure.entry)]
    loaded: list[Loaded] = []
    for distribution in distributions:
        for entry in distribution.entries:
            if not wanted.verdict(distribution.name, entry.name):
                _sort(_load(distribution, entry), loaded, failures)
    found = assemble(loaded, failures, wanted.kept_out(distributions))
    if found.failures and environ.get("QUANTPLUG_STRICT", "") not in ("", "0"):
        raise PluginError(
            "QP-PLUG-STRICT",
            "QUANTPLUG_STRICT",
            "; ".join(str(failure) for failure in found.failures),
            expected="no plugin to fail",
            fix="Repair or uninstall it, keep it out with QUANTPLUG_DISABLE_PLUGINS, or unset QUANTPLUG_STRICT",
        )
    return found


def build_registry(modules: Mapping[str, object]) -> Registry:
    """
    Build a registry from plugins in memory, by the same rules as installed ones.

    Args:
        modules: distribution name -> module, or any object whose attributes are `hookimpl` functions; it need not say
            `quantplug_api`.

    """
    loaded: list[Loaded] = []
    failures: list[PluginFailure] = []
    for name, module in modules.items():
        api = getattr(module, "quantplug_api", "")
        info = PluginInfo(normalise(name), "", name, getattr(module, "__name__", type(module).__name__), api, (), "")
        problem = _api_problem(api) if api else ""
        _sort(_failure(info, "api", Fault(problem)) if problem else _admit(info, module), loaded, failures)
    return assemble(loaded, failures)


def _sort(result: Loaded | PluginFailure, loaded: list[Loaded], failures: list[PluginFailure]) -> None:
    if isinstance(result, Loaded):
        loaded.append(result)
    else:
        failures.append(result)


def _load(distribution: Distribution, entry: EntryPoint) -> Loaded | PluginFailure:
    """Take one entry point through the stages up to the import, then admit what was imported."""
    info = PluginInfo(distribution.name, distribution.version, entry.name, "", "", (), distribution.location)
    value = _VALUE.fullmatch(entry.value)
    if value is None:
        error = PluginError(
            "QP-PLUG-METADATA",
            f"{distribution.location}: [{GROUP}] {entry.name}",
            f"names {entry.value!r}",
            expected="module or module:attribute",
        )
        return _failure(info, "metadata", Fault(str(error)))
    source = isolated(partial(_source, value["module"]))
    if isinstance(source, Fault):
        return _failure(info, "import", source)
    api = isolated(partial(_declared_api, source))
    if isinstance(api, Fault):
        return _failure(info, "api", api)
    plugin = isolated(partial(_import, value["module"], value["attribute"], api))
    if isinstance(plugin, Fault):
        return _failure(info, "import", plugin)
    return _admit(replace(info, module=value["module"], api=api), plugin)


def _admit(info: PluginInfo, plugin: object) -> Loaded | PluginFailure:
    """Take an imported plugin through the stages that pluggy checks and that its own answers decide."""
    manager = isolated(partial(register, plugin, info.distribution))
    if isinstance(manager, Fault):
        return _failure(info, "hooks", manager)
    offer = collect(manager, plugin)
    if isinstance(offer, Fault):
        return _failure(info, "call", offer)
    return Loaded(replace(info, hooks=offer.hooks), offer)


def _failure(info: PluginInfo, stage: Stage, fault: Fault) -> PluginFailure:
    return PluginFailure(info.distribution, info.version, info.entry, stage, fault.error, fault.detail, info.location)


def _source(module: str) -> Path:
    """
    Return a module's source file without importing anything, its parent package included.

    Raises:
        ModuleNotFoundError: when there is no top-level module of that name.
        PluginError: `QP-PLUG-API` when there is, and it has no source for the module.

    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    if not rest:
        candidates = [Path(spec.origin or "")]
    else:
        stems = [Path(folder, *rest) for folder in spec.submodule_search_locations or ()]
        candidates = [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")]
    for candidate in candidates:
        if candidate.suffix == ".py" and candidate.is_file():
            return candidate
    raise PluginError(
        "QP-PLUG-API",
        module,
        "there is no such source file",
        expected=" or ".join(str(candidate) for candidate in candidates) or f"a package {top}, not a module",
        fix="A plugin's module is plain Python, so that quantplug_api can be read before it runs",
    )


def _declared_api(source: Path) -> str:
    """Return the range that a plugin's source declares; raises `PluginError` (`QP-PLUG-API`) unless we are in it."""
    found = _API.search(source.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise PluginError(
            "QP-PLUG-API",
            str(source),
            "does not say which version of the hooks it speaks",
            expected=f'a line such as quantplug_api = ">={API_VERSION.split(".")[0]}"',
        )
    problem = _api_problem(found["range"])
    if problem:
        raise PluginError("QP-PLUG-API", str(source), problem, expected=f"a range that has {API_VERSION}", fix=_API_FIX)
    return found["range"]


@cache
def _api_problem(text: str) -> str:
    try:
        fits = bool(text.strip()) and SpecifierSet(text).contains(API_VERSION)
    except InvalidSpecifier:
        return f"quantplug_api = {text!r} is not a version range"
    return "" if fits else f"quantplug_api = {text!r}, and this core speaks {API_VERSION}"


def _import(module: str, attribute: str | None, api: str) -> object:
    """Return what the entry point names; raises `PluginError` (`QP-PLUG-API`) when the module unsays its source."""
    thing: object = importlib.import_module(module)
    said = getattr(thing, "quantplug_api", None)
    if said != api:
        raise PluginError("QP-PLUG-API", module, f"its quantplug_api is {said!r}, its source says {api!r}")
    for name in attribute.split(".") if attribute else ():
        thing = getattr(thing, name)
    return thing
