"""
Broken plugins: each is installed beside good ones, kept as a failure that says what happened, and harms nobody else.
"""

from __future__ import annotations

import gc
import re
import sys

import pytest

from quantplug.errors import PluginError
from quantplug.plugins import discover

HOOKS = """
    from quantplug.hooks import hookimpl
    from quantplug.kernel import LinearKernel
    from quantplug.scheme import LinearScheme
    from PACKAGE.scheme import Scheme

    quantplug_api = ">=1,<2"

    @hookimpl
    def quantplug_schemes():
        return [Scheme]

    Kernel = type(
        "Kernel",
        (LinearKernel,),
        {**dict.fromkeys(LinearKernel.__abstractmethods__, print), "name": "bad.kernel", "layout_id": "bad"},
    )
"""
"""A plugin that would be fine; a test appends what is not. Its scheme must not survive that."""

BEGIN = 'quantplug_api = ">=1,<2"\n'

IMPORTS = {
    "raises ImportError": (
        BEGIN + "import torch_npu_that_is_not_there",
        r"^ModuleNotFoundError: No module named 'torch_npu_that_is_not_there'$",
    ),
    "raises any exception": (BEGIN + "raise ValueError('two\\nlines')", r"^ValueError: two lines$"),
    "raises SystemExit": (BEGIN + "raise SystemExit(3)", r"^SystemExit: 3$"),
    "raises a BaseException of its own": (
        BEGIN + "class PanicException(BaseException): ...\nraise PanicException('index out of bounds')",
        r"^PanicException: index out of bounds$",
    ),
    "raises what cannot be printed": (
        BEGIN + "class Odd(Exception):\n    def __str__(self): raise RuntimeError\nraise Odd",
        r"^Odd: \(its message cannot be printed\)$",
    ),
    "is not Python": (BEGIN + "def broken(:", r"^SyntaxError: .*plugin.py, line 2"),
    "recurses without end": (BEGIN + "def f(): f()\nf()", r"^RecursionError: "),
    "warns, where warnings are errors": (BEGIN + "import warnings\nwarnings.warn('old')", r"^UserWarning: old$"),
    "has no plugin.py": (
        None,
        r"quantplug_bad\.plugin: there is no such source file; expected .*plugin\.py or .*\[QP-PLUG-API\]$",
    ),
    "unsays its API version": (
        BEGIN + 'quantplug_api += ",!=1.0"',
        r"its quantplug_api is '>=1,<2,!=1.0', its source says '>=1,<2' \[QP-PLUG-API\]$",
    ),
}

VALUES = {
    "names a missing package": (
        "no_such_package.plugin",
        "import",
        r"^ModuleNotFoundError: No module named 'no_such_package'$",
    ),
    "names a missing attribute": ("quantplug_bad.plugin:Gone", "import", r"^AttributeError: .*no attribute 'Gone'"),
    "names a module in a module": ("quantplug_bad_single.plugin", "import", r"expected a package quantplug_bad_single"),
    "names nothing that could be a module": (
        "!!! garbage",
        "metadata",
        r"\[quantplug.plugins\] quantplug-bad: names '!!! garbage'; expected module or module:attribute \[QP-PLUG-META",
    ),
}

FILES = {
    "has no INI file": (b"[quantplug.plugins]\nbad\n", r"line 2 is neither \[group\] nor name = value: 'bad'"),
    "has an INI file with an open bracket": (b"[quantplug.plugins]\n[more\n", r"line 2 is neither .*: '\[more'"),
    "has an INI file without a group": (b"bad = x\n[quantplug.plugins]\n", r"line 1 is neither"),
    "has a file that is not UTF-8": (b"[other]\nx = \xff\n[quantplug.plugins]\n", r"is not UTF-8 at byte 12"),
    "has a UTF-16 file": ("[quantplug.plugins]\nbad = x\n".encode("utf-16"), r"is not UTF-8 at byte 0"),
}

APIS = {
    "does not say its API version": ("", r"does not say which version.*quantplug_api = \">=1\""),
    "says its API version inside a function only": (
        "def f():\n    quantplug_api = '>=1'",
        r"does not say which version",
    ),
    "wants a newer API": (
        "quantplug_api = '>=2,<3'",
        r"quantplug_api = '>=2,<3', and this core speaks 1\.0; .*Install",
    ),
    "wants an older API": ("quantplug_api = '<1'", r"quantplug_api = '<1', and this core speaks 1\.0"),
    "has an API version that is no range": (
        "quantplug_api: str = '1.x'",
        r"quantplug_api = '1.x' is not a version range",
    ),
    "has an empty API version": ("quantplug_api = ''", r"quantplug_api = '', and this core speaks"),
}

HOOK_FAULTS = {
    "misspells a hook": (
        "@hookimpl\ndef quantplug_kernal(): return []",
        r"there is no hook 'quantplug_kernal'.*Did you mean 'quantplug_kernels'\? \[QP-PLUG-HOOK\]$",
    ),
    "implements a hook of its own": (
        "@hookimpl\ndef zzz(): return []",
        r"there is no hook 'zzz'; expected one of quantplug_",
    ),
    "has a hook with parameters": (
        "@hookimpl\ndef quantplug_kernels(config, *, strict): return []",
        r"quantplug_kernels\(config, \*, strict\) asks for config, strict; expected quantplug_kernels\(\) -> ",
    ),
    "forgets to mark a hook": (
        "def quantplug_kernels(): return []",
        r"quantplug_kernels: is of type function and not marked.*Decorate the function with quantplug.hookimpl",
    ),
    "gives a hook's name to a list": ("quantplug_kernels = []", r"quantplug_kernels: is of type list and not marked"),
    "has a wrapper that is none": (
        "@hookimpl(wrapper=True)\ndef quantplug_kernels(): return []",
        r"^PluginValidationError: .*wrapper",
    ),
}


def returns(expression: str, hook: str = "quantplug_kernels") -> str:
    return f"@hookimpl\ndef {hook}(): return {expression}"


CALLS = {
    "raises when asked": ("@hookimpl\ndef quantplug_kernels(): 1 / 0", r"^quantplug_kernels\(\): ZeroDivisionError: "),
    "exits when asked": (
        "import sys\n@hookimpl\ndef quantplug_kernels(): sys.exit()",
        r"^quantplug_kernels\(\): SystemExit",
    ),
    "returns None": (returns("None"), r"returned None; expected a list, Sequence\[Kernel\] \[QP-PLUG-CALL\]$"),
    "returns a coroutine": (
        "@hookimpl\nasync def quantplug_kernels(): return []",
        r"returned an object of type coroutine; expected",
    ),
    "returns a generator": (
        "@hookimpl\ndef quantplug_kernels(): yield Kernel()",
        r"returned an object of type generator; expected",
    ),
    "returns text": (returns("'kernel'"), r"returned an object of type str; expected"),
    "returns a dictionary": (returns("{}"), r"returned an object of type dict; expected"),
    "returns a kernel's class": (
        returns("[Kernel]"),
        r"item 0: is the class Kernel; expected an instance of LinearKernel",
    ),
    "returns a foreign object": (
        returns("[Kernel(), 7]"),
        r"item 1: is of type int; expected an instance of LinearKernel",
    ),
    "returns a kernel without a name": (
        returns("[type('Nameless', (Kernel,), {'name': None})()]"),
        r"item 0: is named None; expected a name such as",
    ),
    "returns a kernel with odd traits": (
        returns("[type('Odd', (Kernel,), {'traits': {}})()]"),
        r"item 0: traits: is of type dict; expected an instance of Traits",
    ),
    "returns two kernels of one name": (
        returns("[Kernel(), Kernel()]"),
        r"item 1: is another 'bad.kernel'; expected one per name",
    ),
    "returns a scheme that is not whole": (
        "from quantplug.scheme import LinearScheme\n@hookimpl(specname='quantplug_schemes')\n"
        "def more(): return [type('Half', (LinearScheme,), {'name': 'half'})]",
        r"Half does not implement build, ",
    ),
    "returns a scheme's instance": (
        "@hookimpl(specname='quantplug_schemes')\ndef more(): return [Scheme()]",
        r"item 0: is of type Scheme; expected a class derived from LinearScheme",
    ),
    "takes the reference kernel's name": (
        returns("[type('Mine', (Kernel,), {'name': 'reference'})()]"),
        r"provides kernel 'reference', which is the core's own; expected another name",
    ),
    "takes a platform of the core": (
        "from quantplug.detect import CpuProvider\n" + returns("[CpuProvider()]", "quantplug_platforms"),
        r"provides platform 'cpu', which is the core's own",
    ),
    "recognises a platform that nobody can spell": (
        "from quantplug.detect import CpuProvider\n"
        + returns("[type('P', (CpuProvider,), {'kind': '9pu'})()]", "quantplug_platforms"),
        r"platform '9pu': not a platform; expected KIND",
    ),
    "returns a host that is none": (returns("[object()]", "quantplug_hosts"), r"expected an instance of Host"),
    "returns rules of an engine that are none": (
        returns("[object()]", "quantplug_peers"),
        r"expected an instance of PeerReader",
    ),
    "returns rules of an engine without a release": (
        "from quantplug.peers import PeerReader\n"
        + returns("[type('P', (PeerReader,), {'name': 'x', 'version': '', 'reading': print})()]", "quantplug_peers"),
        r"has version ''; expected the release, a text",
    ),
    "returns name rules that are none": (
        returns("['llama']", "quantplug_architectures"),
        r"expected an instance of Architecture",
    ),
}

DIALECT = """
from quantplug.config import Dialect
def dialect(name, methods, files=(), writes=frozenset()):
    body = {**dict.fromkeys(Dialect.__abstractmethods__, print), "name": name, "methods": methods, "files": files}
    body["writes"] = writes
    return type("D", (Dialect,), body)()
"""

DIALECTS = {
    "has a dialect whose methods are text": (
        "dialect('a', 'gptq')",
        r"has methods 'gptq'; expected a tuple of strings",
    ),
    "has a dialect that shouts": ("dialect('a', ('GPTQ',))", r"has methods \('GPTQ',\); expected lower case"),
    "has a dialect with odd files": ("dialect('a', ('x',), 3)", r"has files 3; expected a tuple of strings"),
    "has a dialect that writes odd things": ("dialect('a', ('x',), (), 'x')", r"has writes 'x'; expected a frozenset"),
    "has two dialects for one method": ("dialect('a', ('x',)), dialect('b', ('x',))", r"b: answers to 'x' as 'a' does"),
}


def check(site, stage: str, reason: str, *, entry: str = "quantplug-bad") -> None:
    """The faulty plugin is a failure with all its facts, its neighbours work, now and in the next discovery."""
    site.install("quantplug-a")
    site.install("quantplug-z")
    path = [str(site.directory)]
    for _ in range(2):
        found = discover(path, environ={})
        assert [plugin.distribution for plugin in found.plugins] == ["quantplug-a", "quantplug-z"]
        [failure] = found.failures
        assert (failure.distribution, failure.version, failure.entry) == ("quantplug-bad", "1.0", entry)
        assert failure.stage == stage
        assert failure.location == str(site.directory)
        assert re.search(reason, failure.error), failure.error
        assert "\n" not in failure.error
        assert set(found.schemes) == {"quantplug-a", "quantplug-z"}
        assert set(found.kernels) == {"reference"}
        assert set(found.platforms) == {"cpu", "cuda"}
        assert found.scheme("quantplug-a").item().describe() == "quantplug-a works"
        with pytest.raises(PluginError, match="note that quantplug-bad 1.0.* failed at " + stage) as caught:
            found.scheme("quantplug-bad")
        assert caught.value.code == "QP-PLUG-MISSING"
    good = discover(path, environ={"QUANTPLUG_DISABLE_PLUGINS": "quantplug-bad"})
    assert good.failures == ()
    assert len(good.plugins) == 2
    gc.collect()  # a coroutine that nobody awaited would warn here


@pytest.mark.parametrize(("source", "reason"), IMPORTS.values(), ids=IMPORTS)
def test_a_plugin_that_fails_at_import(site, source, reason):
    site.install("quantplug-bad", source)
    check(site, "import", reason)


@pytest.mark.parametrize(("value", "stage", "reason"), VALUES.values(), ids=VALUES)
def test_a_plugin_whose_entry_point(site, value, stage, reason):
    site.install("quantplug-bad", entry_points=f"[quantplug.plugins]\nquantplug-bad = {value}\n")
    (site.directory / "quantplug_bad_single.py").write_text(BEGIN)
    check(site, stage, reason)


@pytest.mark.parametrize(("content", "reason"), FILES.values(), ids=FILES)
def test_a_distribution_that(site, content, reason):
    site.install("quantplug-bad", entry_points=content)
    check(site, "metadata", reason + r".*\. Reinstall the distribution \[QP-PLUG-METADATA\]$", entry="")


@pytest.mark.parametrize(("source", "reason"), APIS.values(), ids=APIS)
def test_a_plugin_that_speaks_another_language_is_not_imported(site, source, reason):
    site.install("quantplug-bad", source + "\nraise SystemError('this must not run')")
    check(site, "api", r"plugin\.py: .*" + reason + r".*\[QP-PLUG-API\]$")
    assert "quantplug_bad" not in sys.modules


@pytest.mark.parametrize(("source", "reason"), HOOK_FAULTS.values(), ids=HOOK_FAULTS)
def test_a_plugin_whose_hooks_do_not_fit_is_rolled_back(site, source, reason):
    site.install("quantplug-bad", HOOKS + indent(source))
    check(site, "hooks", reason)


@pytest.mark.parametrize(("source", "reason"), CALLS.values(), ids=CALLS)
def test_a_plugin_that_misbehaves_when_asked(site, source, reason):
    site.install("quantplug-bad", HOOKS + indent(source))
    check(site, "call", reason)


@pytest.mark.parametrize(("dialects", "reason"), DIALECTS.values(), ids=DIALECTS)
def test_a_plugin_that(site, dialects, reason):
    site.install("quantplug-bad", HOOKS + indent(DIALECT + returns(f"[{dialects}]", "quantplug_dialects")))
    check(site, "call", reason)


def indent(source: str) -> str:
    return "\n" + "".join(f"    {line}\n" for line in source.split("\n"))


def test_a_distribution_without_metadata(site):
    site.install("quantplug-bad", metadata="")
    check(site, "metadata", r"METADATA: cannot be read: No such file or directory\. Reinstall", entry="")


def test_a_distribution_without_a_name(site):
    site.install("quantplug-bad", metadata="Metadata-Version: 2.4\nVersion: 1.0\n\nName: not a header\n")
    check(site, "metadata", r"METADATA: has no name\. Reinstall", entry="")


def test_a_distribution_whose_entry_points_cannot_be_read(site):
    info = site.install("quantplug-bad")
    (info / "entry_points.txt").unlink()
    (info / "entry_points.txt").mkdir()
    check(site, "metadata", r"entry_points\.txt: cannot be read: Is a directory", entry="")


def test_an_entry_point_named_twice_in_one_distribution(site):
    lines = "[quantplug.plugins]\ntwice = quantplug_bad.plugin\n twice=other.plugin\n"
    site.install("quantplug-bad", entry_points=lines)
    check(site, "metadata", r"names twice twice: quantplug_bad\.plugin and other\.plugin\.", entry="twice")


def test_only_the_faulty_one_of_two_entry_points_is_dropped(site):
    lines = "[quantplug.plugins]\nfine = quantplug_bad.plugin\nfaulty = quantplug_bad.gone\n"
    site.install("quantplug-bad", entry_points=lines)
    found = discover([str(site.directory)], environ={})
    assert [plugin.entry for plugin in found.plugins] == ["fine"]
    assert [(failure.entry, failure.stage) for failure in found.failures] == [("faulty", "import")]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"not INI at all", "[other]\nx = é".encode("latin-1")])
def test_a_damaged_distribution_that_is_not_about_us_is_nobodys_business(site, content):
    site.install("unrelated", entry_points=content, metadata="")
    site.install("quantplug-a")
    found = discover([str(site.directory)], environ={})
    assert found.failures == ()
    assert len(found.plugins) == 1


def test_a_keyboard_interrupt_is_no_fault_of_a_plugin(site):
    """Ctrl-C while a plugin is imported reaches the user, and discovery works afterwards."""
    site.install("quantplug-slow", BEGIN + "import os\nif not os.environ.get('DONE'): raise KeyboardInterrupt")
    path = [str(site.directory)]
    with pytest.raises(KeyboardInterrupt):
        discover(path, environ={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DONE", "1")
        assert len(discover(path, environ={}).plugins) == 1


def test_a_failure_keeps_the_traceback(site):
    site.install("quantplug-bad", BEGIN + "def helper():\n    raise ValueError('deep')\nhelper()\n")
    [failure] = discover([str(site.directory)], environ={}).failures
    assert failure.detail.startswith("Traceback")
    assert "in helper" in failure.detail
    assert str(failure) == "quantplug-bad 1.0 (quantplug-bad) failed at import: ValueError: deep"


def test_a_plugins_wrapper_sees_its_own_answers_only(site):
    """With one manager for all, pluggy would let a plugin's wrapper change what another one says."""
    wrapper = "@hookimpl(wrapper=True)\ndef quantplug_kernels():\n    yield\n    return []"
    site.install("quantplug-bad", HOOKS + indent(wrapper))
    site.install("quantplug-fine", HOOKS + indent(returns("[Kernel()]")))
    found = discover([str(site.directory)], environ={})
    assert found.failures == ()
    assert found.kernel("bad.kernel").plugin == "quantplug-fine"
