"""
What one plugin offers: registered with pluggy, asked, and every answer checked.

Each plugin gets a pluggy manager of its own. pluggy keeps what it registered before it found something wrong, so a
manager that refused a plugin is thrown away, and no plugin's wrapper can touch another one's answers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pluggy

from quantplug import hooks
from quantplug.config import Dialect
from quantplug.detect import PlatformProvider
from quantplug.errors import PluginError
from quantplug.host import Host
from quantplug.isolation import Fault, isolated
from quantplug.kernel import LinearKernel, Traits
from quantplug.moekernel import MoEKernel
from quantplug.moeloop import PREFIX
from quantplug.names import Architecture
from quantplug.peers import PeerReader
from quantplug.platform import Platform
from quantplug.scheme import LinearScheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantplug.jsonio import Json
    from quantplug.moekernel import Kernel

_NAME = re.compile(r"[a-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Offer:
    """All that one plugin provides, by name and checked."""

    hooks: tuple[str, ...] = ()
    schemes: Mapping[str, type[LinearScheme]] = field(default_factory=dict)
    dialects: Mapping[str, Dialect] = field(default_factory=dict)
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    platforms: Mapping[str, PlatformProvider] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)
    peers: Mapping[str, PeerReader] = field(default_factory=dict)
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Mapping[str, Json]]] = field(default_factory=dict)
    """By scheme name: what its `recipes` returned."""


class _Manager(pluggy.PluginManager):
    """A manager that does not look at what cannot be a hook; that halves the time it takes to register a plugin."""

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        return super().parse_hookspec_opts(module_or_class, name) if name in _CHECKS else None

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)


def register(plugin: object, name: str) -> pluggy.PluginManager:
    """
    Return a manager that holds this plugin only.

    Raises:
        PluginError: `QP-PLUG-HOOK` when it implements a hook that does not exist, or one with parameters that the hook
            does not have, or has something of a hook's name that is not marked as its implementation.

    """
    manager = _Manager(hooks.hookspec.project_name)
    manager.add_hookspecs(hooks)
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is not None:
            _check_signature(getattr(plugin, attribute), attribute, options["specname"] or attribute, options)
        elif attribute in _CHECKS:
            raise PluginError(
                "QP-PLUG-HOOK",
                attribute,
                f"is {_type(getattr(plugin, attribute))} and not marked as an implementation",
                expected=_signature(attribute),
                fix="Decorate the function with quantplug.hookimpl",
            )
    manager.register(plugin, name)
    manager.check_pending()
    return manager


def collect(manager: pluggy.PluginManager, plugin: object) -> Offer | Fault:
    """Ask every hook of a registered plugin; the first that raises or answers wrongly is the plugin's fault."""
    found: dict[str, dict[str, Any]] = {}
    for caller in manager.get_hookcallers(plugin) or []:
        answers = isolated(partial(_ask, caller))
        if isinstance(answers, Fault):
            return Fault(f"{caller.name}(): {answers.error}", answers.detail)
        found[caller.name] = answers
    recipes = isolated(partial(_recipes, found.get("quantplug_schemes", {})))
    if isinstance(recipes, Fault):
        return Fault(f"quantplug_schemes(): {recipes.error}", recipes.detail)
    return Offer(
        tuple(sorted(found)),
        recipes=recipes,
        **{name.removeprefix(_PREFIX): answers for name, answers in found.items()},
    )


def _recipes(schemes: Mapping[str, type[LinearScheme]]) -> dict[str, Mapping[str, Mapping[str, Json]]]:
    """Ask every scheme for its recipes; raises `PluginError` for a wrong answer, or a name given twice."""
    result: dict[str, Mapping[str, Mapping[str, Json]]] = {}
    names: dict[str, str] = {}
    for scheme, item in schemes.items():
        recipes: Any = item.recipes()
        if not isinstance(recipes, Mapping) or not all(isinstance(params, Mapping) for params in recipes.values()):
            raise PluginError("QP-PLUG-CALL", f"{scheme}.recipes()", f"returned {recipes!r}", expected="{name: params}")
        for name in recipes:
            _named(name, f"{scheme}.recipes()")
            if names.setdefault(name, scheme) != scheme:
                raise PluginError(
                    "QP-PLUG-CALL",
                    f"{scheme}.recipes()",
                    f"has {name!r}, as {names[name]} has",
                    expected="one per name",
                )
        result[scheme] = dict(recipes)
    return result


def _check_signature(function: Any, attribute: str, hook: str, options: Mapping[str, Any]) -> None:
    if hook not in _CHECKS:
        if options["optionalhook"]:
            return
        from difflib import get_close_matches

        close = get_close_matches(hook, _CHECKS, n=1)
        raise PluginError(
            "QP-PLUG-HOOK",
            attribute,
            f"there is no hook {hook!r}",
            expected=f"one of {', '.join(sorted(_CHECKS))}",
            fix=f"Did you mean {close[0]!r}?" if close else "",
        )
    known = inspect.signature(getattr(hooks, hook)).parameters
    signature = inspect.signature(function)
    extra = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in known
    ]
    if extra:
        raise PluginError(
            "QP-PLUG-HOOK",
            attribute,
            f"{attribute}{signature} asks for {', '.join(extra)}",
            expected=_signature(hook),
        )


def _signature(hook: str) -> str:
    return f"{hook}{inspect.signature(getattr(hooks, hook))}"


def _ask(caller: pluggy.HookCaller) -> dict[str, Any]:
    """Call one hook of one plugin and return its items by name; raises `PluginError` for a wrong answer."""
    answers = caller()
    implementations = [impl for impl in caller.get_hookimpls() if not (impl.wrapper or impl.hookwrapper)]
    if len(answers) != len(implementations):  # pluggy leaves None out
        raise _wrong("returned None", caller.name)
    items: dict[str, Any] = {}
    for answer in answers:
        if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
            if inspect.iscoroutine(answer):
                answer.close()  # or Python warns that nobody awaited it
            raise _wrong(f"returned an object {_type(answer)}", caller.name)
        for number, item in enumerate(answer):
            name = _CHECKS[caller.name](item, f"item {number}")
            if name in items:
                raise PluginError("QP-PLUG-CALL", f"item {number}", f"is another {name!r}", expected="one per name")
            items[name] = item
    if caller.name in _ANSWERS_TO:
        _answer_once(items, _ANSWERS_TO[caller.name])
    return items


def _answer_once(items: Mapping[str, Any], attribute: str) -> None:
    answering: dict[str, str] = {}
    for name, item in items.items():
        for word in getattr(item, attribute):
            if answering.setdefault(word, name) != name:
                raise PluginError(
                    "QP-PLUG-CALL", name, f"answers to {word!r} as {answering[word]!r} does", expected="one per word"
                )


def _wrong(what: str, hook: str) -> PluginError:
    expected = str(inspect.signature(getattr(hooks, hook)).return_annotation)
    return PluginError("QP-PLUG-CALL", "answer", what, expected=f"a list, {expected}")


def _type(thing: object) -> str:
    return f"the class {thing.__qualname__}" if isinstance(thing, type) else f"of type {type(thing).__qualname__}"


def _instance(item: object, where: str, kind: type) -> None:
    if not isinstance(item, kind):
        raise PluginError("QP-PLUG-CALL", where, f"is {_type(item)}", expected=f"an instance of {kind.__qualname__}")


def _named(name: object, where: str) -> str:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise PluginError("QP-PLUG-CALL", where, f"is named {name!r}", expected=f"a name such as {_NAME.pattern}")
    return name


def _strings(value: object, where: str, attribute: str) -> None:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise PluginError("QP-PLUG-CALL", where, f"has {attribute} {value!r}", expected="a tuple of strings")


def _scheme(item: Any, where: str) -> str:
    if not (isinstance(item, type) and issubclass(item, LinearScheme)):
        raise PluginError("QP-PLUG-CALL", where, f"is {_type(item)}", expected="a class derived from LinearScheme")
    if inspect.isabstract(item):
        missing = ", ".join(sorted(item.__abstractmethods__))
        raise PluginError("QP-PLUG-CALL", where, f"{item.__qualname__} does not implement {missing}")
    return _named(item.name, where)


def _dialect(item: Any, where: str) -> str:
    _instance(item, where, Dialect)
    _strings(item.methods, where, "methods")
    _strings(item.files, where, "files")
    if not isinstance(item.writes, frozenset):
        raise PluginError("QP-PLUG-CALL", where, f"has writes {item.writes!r}", expected="a frozenset of scheme names")
    if any(method != method.lower() for method in item.methods):
        raise PluginError("QP-PLUG-CALL", where, f"has methods {item.methods!r}", expected="lower case")
    return _named(item.name, where)


def _kernel(item: Any, where: str) -> str:
    if not isinstance(item, MoEKernel):
        _instance(item, where, LinearKernel)
    if _named(item.name, where).startswith(PREFIX):
        raise PluginError(
            "QP-PLUG-CALL", where, f"is named {item.name!r}", expected=f"no name that begins with {PREFIX}"
        )
    _named(item.layout_id, f"{where}: layout_id")
    _instance(item.traits, f"{where}: traits", Traits)
    return _named(item.name, where)


def _platform(item: Any, where: str) -> str:
    _instance(item, where, PlatformProvider)
    kind = _named(item.kind, where)
    if Platform.parse(kind).kind != kind:
        raise PluginError("QP-PLUG-CALL", where, f"has the kind {kind!r}", expected="a torch device type")
    return kind


def _host(item: Any, where: str) -> str:
    _instance(item, where, Host)
    return _named(item.name, where)


def _peer(item: Any, where: str) -> str:
    _instance(item, where, PeerReader)
    if not isinstance(item.version, str) or not item.version:
        raise PluginError("QP-PLUG-CALL", where, f"has version {item.version!r}", expected="the release, a text")
    return _named(item.name, where)


def _architecture(item: Any, where: str) -> str:
    _instance(item, where, Architecture)
    _strings(item.model_types, where, "model_types")
    return _named(item.name, where)


_PREFIX = "quantplug_"

_ANSWERS_TO = {"quantplug_dialects": "methods", "quantplug_architectures": "model_types"}

_CHECKS: Mapping[str, Callable[[Any, str], str]] = {
    "quantplug_schemes": _scheme,
    "quantplug_dialects": _dialect,
    "quantplug_kernels": _kernel,
    "quantplug_platforms": _platform,
    "quantplug_hosts": _host,
    "quantplug_peers": _peer,
    "quantplug_architectures": _architecture,
}
"""Every hook, with what an item of its answer must be; returns the name that the item goes by."""
