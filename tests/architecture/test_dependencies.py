"""
Who may import whom, and that what is imported is declared.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from sources import ROOT, Project, dotted, place, projects, tree

PROJECTS = pytest.mark.parametrize("project", projects(), ids=lambda project: project.name)


def normalise(requirement: str) -> str:
    """Return the normalised name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


ELSEWHERE = {"humming": ["humming-kernels"], "deep_gemm": ["sgl-deep-gemm"]}
"""Who brings a module that the tests do without and that is not called as its distribution is."""


@cache
def distribution_of(module: str) -> frozenset[str]:
    """Return the distributions that bring a top-level module, ours from their own settings."""
    ours = {project.package: project.name for project in projects()}
    named = ELSEWHERE.get(module, [module])
    found = [ours[module]] if module in ours else packages_distributions().get(module, named)
    return frozenset(normalise(name) for name in found)


def imported(file: Path) -> dict[str, ast.AST]:
    """Return the top-level modules that a source imports anywhere, at whatever time and for whatever purpose."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(tree(file)):
        match node:
            case ast.Import(names=names):
                modules = [name.name for name in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case ast.Call(func=func, args=[ast.Constant(value=str(module)), *_]) if dotted(func).endswith(
                ("import_module", "find_spec", "__import__")
            ):
                modules = [module]
            case _:
                continue
        found.update((module.split(".")[0], node) for module in modules)
    return {module: node for module, node in found.items() if module not in sys.stdlib_module_names}


@PROJECTS
def test_what_a_distribution_imports_it_declares(project: Project):
    declared = {normalise(requirement) for requirement in project.required + project.optional}
    undeclared = [
        f"{place(file, node)} imports {module}"
        for file in project.sources
        for module, node in imported(file).items()
        if module != project.package and not declared & distribution_of(module)
    ]
    assert undeclared == []


@PROJECTS
def test_what_a_distribution_requires_it_imports(project: Project):
    """An extra may be for somebody else's import, so extras are left out."""
    used = {name for file in project.sources for module in imported(file) for name in distribution_of(module)}
    assert {normalise(requirement) for requirement in project.required} - used == set()


@PROJECTS
def test_a_plugin_imports_the_core_and_no_sibling(project: Project):
    ours = {other.package for other in projects()}
    allowed = {project.package, "quantplug"} if project.package != "quantplug" else {"quantplug"}
    foreign = [
        f"{place(file, node)} imports {module}"
        for file in project.sources
        for module, node in imported(file).items()
        if module in ours - allowed
    ]
    assert foreign == []


@PROJECTS
def test_one_word_names_folder_distribution_package_and_entry_point(project: Project):
    word = {"core": ""}.get(project.folder.name, project.folder.name)
    assert project.name == f"quantplug-{project.folder.name}"
    assert project.package == "_".join(["quantplug", *word.replace("-", "_").split("_")]).rstrip("_")
    assert set(project.plugin_modules) <= {f"{project.package}.plugin"}


def test_import_linter_agrees(tmp_path):
    """The contracts in pyproject.toml hold, through any chain of imports."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
