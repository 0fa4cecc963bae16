"""
The repository as the architecture tests see it: distributions, their sources, and those as syntax trees.
"""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The root of the repository."""


@dataclass(frozen=True)
class Project:
    """One distribution: its folder, what its pyproject.toml says, and the package it ships."""

    folder: Path
    name: str
    package: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    plugin_modules: tuple[str, ...]

    @property
    def sources(self) -> list[Path]:
        """Return its Python files."""
        return sorted((self.folder / "src").rglob("*.py"))


@cache
def projects() -> tuple[Project, ...]:
    """Return every distribution of the repository but the meta-package."""
    found = []
    for file in sorted([*ROOT.glob("*/pyproject.toml"), *ROOT.glob("*/*/pyproject.toml")]):
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
        project = settings["project"]
        [package] = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        extras = project.get("optional-dependencies", {}).values()
        found.append(
            Project(
                file.parent,
                project["name"],
                Path(package).name,
                tuple(project["dependencies"]),
                tuple(requirement for extra in extras for requirement in extra),
                tuple(project.get("entry-points", {}).get("quantplug.plugins", {}).values()),
            )
        )
    return tuple(found)


def product() -> list[Path]:
    """Return the sources that users run: all but the testkit."""
    return [file for project in projects() if project.name != "quantplug-testkit" for file in project.sources]


@cache
def tree(file: Path) -> ast.Module:
    """Return a source as a syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def place(file: Path, node: ast.AST | None = None) -> str:
    """Return where something is, for messages."""
    line = f":{getattr(node, 'lineno', 1)}" if node is not None else ""
    return f"{file.relative_to(ROOT)}{line}"


def dotted(node: ast.AST) -> str:
    """Return a name such as `torch.load` as it is spelled, "" for anything but names and attributes."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            before = dotted(value)
            return f"{before}.{name}" if before else ""
    return ""


def docstrings(module: ast.Module) -> set[int]:
    """Return the ids of the constants that are docstrings, attribute docstrings included."""
    return {
        id(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
