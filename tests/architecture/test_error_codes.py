"""
Every error code is declared, raised and tested; none is left over.
"""

from __future__ import annotations

import ast
import re

from sources import ROOT, place, product, tree

from quantplug.errors import CODES

CODE = re.compile(r"QP-[A-Z]+-[A-Z]+\b")


def test_a_code_that_is_mentioned_anywhere_is_declared():
    mentioned = {(code, place(file)) for file in product() for code in CODE.findall(file.read_text(encoding="utf-8"))}
    assert {(code, where) for code, where in mentioned if code not in CODES} == set()


def test_a_declared_code_is_raised_somewhere():
    """Product code names it as a value, outside the declaration and all explanations."""
    values = {
        node.value
        for file in product()
        if file.name != "errors.py"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(CODES) - values == set()


def test_a_declared_code_appears_in_a_test():
    files = (file for file in sorted((ROOT / "tests").rglob("test_*.py")) if file.parent.name != "architecture")
    tested = {code for file in files for code in CODE.findall(file.read_text(encoding="utf-8"))}
    assert set(CODES) - tested == set()
