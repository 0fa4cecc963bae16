"""
What must not be in product code, and what must.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT, docstrings, dotted, place, product, projects, tree

EVERYTHING = sorted(
    file
    for folder in ("core", "plugins", "tests", "benchmarks", "examples", "docs")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in {".py", ".md", ".toml", ".json", ".tsv", ".txt"} and ".cache" not in file.parts
)

RUNS_DATA = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"} | {
    f"{module}.load" for module in ("torch", "yaml", "numpy", "np")
}
"""Calls that run, or may run, what a file says."""

RUNS_DATA_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "runpy"}

NAMES_CODE = {"__init__.py", "plugins.py"}
"""Where modules are imported by computed names: lazy public surfaces, and installed plugins by their entry points."""

LONGEST = 450

FAMILIES = {
    "PluginError": {"PLUG"},
    "ConfigError": {"CFG", "SKIP"},
    "CheckpointError": {"ST"},
    "PlanError": {"PLAN"},
    "LoadError": {"LOAD"},
    "RunError": {"RUN"},
    "ConvertError": {"CONV"},
    "HostError": {"HOST"},
}


def nodes(kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    """Yield every node of one kind in product code, and the file it is in."""
    return ((file, node) for file in product() for node in ast.walk(tree(file)) if isinstance(node, kind))


def test_input_is_not_checked_by_assert():
    """An assert disappears under `python -O`, and its message names neither file nor remedy."""
    assert [place(file, node) for file, node in nodes(ast.Assert)] == []


def test_no_file_that_is_read_can_run_code():
    calls = [(file, node, dotted(node.func)) for file, node in nodes(ast.Call)]
    found = [f"{place(file, node)} calls {name}" for file, node, name in calls if name in RUNS_DATA]
    imports = [(file, node, [alias.name for alias in node.names]) for file, node in nodes(ast.Import)]
    imports += [(file, node, [node.module or ""]) for file, node in nodes(ast.ImportFrom)]
    found += [
        f"{place(file, node)} imports {name}"
        for file, node, names in imports
        for name in names
        if name.split(".")[0] in RUNS_DATA_MODULES
    ]
    assert found == []


def test_no_file_that_is_read_can_name_code():
    """A module is imported by a literal name, but where installed plugins are."""
    computed = [
        place(file, node)
        for file, node in nodes(ast.Call)
        if dotted(node.func).endswith(("import_module", "find_spec"))
        and not (node.args and isinstance(node.args[0], ast.Constant))
        and file.name not in NAMES_CODE
    ]
    assert computed == []


def test_every_public_module_class_and_function_has_a_docstring():
    missing = []
    stack: list[tuple[Path, ast.Module | ast.ClassDef]] = [(file, tree(file)) for file in product()]
    while stack:
        file, node = stack.pop()
        if not ast.get_docstring(node):
            missing.append(f"{place(file, node)} {getattr(node, 'name', 'module')}")
        stack += [
            (file, child)
            for child in getattr(node, "body", [])
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and not child.name.startswith("_")
            and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
    assert missing == []


def test_a_suppressed_warning_says_why():
    """`noqa` and `type: ignore` carry a code, and a reason behind it or on the line above."""
    directive = re.compile(r"#\s*(?:noqa|type: ignore)(?P<code>: [A-Z]+\d+|\[[a-z-]+\])?(?P<reason>.*\w)?")
    found = []
    for file in product():
        before = ""
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            match = directive.search(line)
            if match and not (match["code"] and (match["reason"] or "#" in before)):
                found.append(f"{place(file)}:{number}: {line.strip()}")
            before = line
    assert found == []


def test_an_error_has_a_code_of_its_class():
    wrong = []
    for file, node in nodes(ast.Call):
        name = dotted(node.func).split(".")[-1]
        if name in FAMILIES and node.args and isinstance(node.args[0], ast.Constant):
            code = str(node.args[0].value)
            if code.split("-")[1:2] not in ([family] for family in FAMILIES[name]):
                wrong.append(f"{place(file, node)}: {name}({code!r})")
    assert wrong == []


def test_a_file_is_short_enough_to_be_read():
    lengths = {
        place(file): len(file.read_text(encoding="utf-8").split("\n")) - 1
        for file in EVERYTHING
        if file.suffix == ".py"
    }
    assert {file: length for file, length in lengths.items() if length > LONGEST} == {}


def test_nothing_refers_to_the_machine_it_was_written_on():
    pattern = re.compile(r"\.\./shared\b|/work/|/root/")
    found = [
        f"{place(file)}: {match}"
        for file in EVERYTHING
        if file.resolve() != Path(__file__).resolve()
        for match in pattern.findall(file.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_core_knows_no_format_framework_or_vendor():
    """Such names may stand in explanations; code that has them decides by them."""
    names = re.compile(
        r"gptq|awq|marlin|auto.?round|compressed.tensors|modelopt|quark|vllm|sglang|transformers|triton|ascend|llama",
        re.IGNORECASE,
    )
    [core] = [project for project in projects() if project.package == "quantplug"]
    found = []
    for file in core.sources:
        explanations = docstrings(tree(file))
        for node in ast.walk(tree(file)):
            words = [dotted(node)] if isinstance(node, (ast.Name, ast.Attribute)) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in explanations:
                words.append(node.value)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                words.append(node.name)
            found += [f"{place(file, node)}: {word!r}" for word in words if names.search(word)]
    assert found == []
