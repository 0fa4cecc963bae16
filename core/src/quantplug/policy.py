"""
What the caller wants of the choice of kernels: prefer, allow, deny or pin, per layer pattern; for which numbers of rows
they are chosen; room for second layouts.
"""

from __future__ import annotations

import fnmatch
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantplug.choices import ROW_BUCKETS
from quantplug.entries import path_entries
from quantplug.errors import PlanError
from quantplug.matcher import matches
from quantplug.moeloop import PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.inventory import ModuleInfo
    from quantplug.skip import Entry

Wish = Literal["pin", "prefer", "allow", "deny"]
_WISHES: tuple[Wish, ...] = ("pin", "prefer", "allow", "deny")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,6})?) ?(?P<unit>|[kKMGT]?B)", re.ASCII)
_MOST_ROWS = 1 << 31
"""More than a call has: what is larger is a slip of the pen."""
_EXAMPLE = 'for example:  [[rule]]  match = "re:.*down_proj"  deny = ["cpu.*"]'


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """
    One wish.

    Attributes:
        wish: "pin" (this kernel or an error), "prefer" (before all others), "allow" (as any other, though it is chosen
            by request only) or "deny" (never).
        kernels: names or globs over names ("cpu.*").
        entry: the layers concerned, typed and matched like a skip entry; None for all.
        origin: where it was said.
    """

    wish: Wish
    kernels: tuple[str, ...]
    entry: Entry | None
    origin: str

    def concerns(self, module: ModuleInfo) -> bool:
        """Whether the wish is about this module."""
        return self.entry is None or matches(self.entry, module)

    def names(self, kernel: str) -> bool:
        """Whether the wish is about this kernel; who names one for linear layers means its loop over experts, too."""
        names = (kernel, kernel.removeprefix(PREFIX))
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.kernels for name in names)


@dataclass(frozen=True, slots=True)
class Policy:
    """
    The caller's wishes.

    Attributes:
        rules: in order; the first that names a kernel for a module holds.
        layout_budget: bytes that second copies of weights may take in all, for layers whose fastest kernels for few
            rows and for many read different layouts.
        rows: numbers of rows M that a layout is chosen for, each counting as much as any other: (1,) for who only
            decodes, alone.
    """

    rules: tuple[PolicyRule, ...] = ()
    layout_budget: int = 0
    rows: tuple[int, ...] = ROW_BUCKETS

    def __post_init__(self) -> None:
        """
        Look at the numbers of rows.

        Raises:
            PlanError: `QP-PLAN-POLICY` where there are none, or one is no number of rows.
        """
        _check_rows(list(self.rows), "rows")

    def wish(self, module: ModuleInfo, kernel: str) -> PolicyRule | None:
        """Return the first rule that concerns the module and names the kernel."""
        for rule in self.rules:
            if rule.names(kernel) and rule.concerns(module):
                return rule
        return None

    def asks_for(self, module: ModuleInfo, kernel: str) -> bool:
        """Return whether a kernel is allowed, or preferred or pinned by its name and not by a glob alone."""
        rule = self.wish(module, kernel)
        if rule is None or rule.wish == "deny":
            return False
        return rule.wish == "allow" or not {kernel, kernel.removeprefix(PREFIX)}.isdisjoint(rule.kernels)

    def pin(self, module: ModuleInfo) -> PolicyRule | None:
        """Return the first pin that concerns the module."""
        return next((rule for rule in self.rules if rule.wish == "pin" and rule.concerns(module)), None)

    @classmethod
    def parse(cls, table: Mapping[str, object], origin: str) -> Policy:
        """
        Read the TOML form: a list `rule` of tables with `match` (optional) and one of `pin`, `prefer`, `allow`,
        `deny`; `layout_budget`, bytes or a text such as "4 GB"; and `rows`, a list of numbers.

        Raises:
            PlanError: `QP-PLAN-POLICY` naming the rule and the field.
        """
        unknown = set(table) - {"rule", "layout_budget", "rows"}
        if unknown:
            raise _malformed(origin, f"unknown key {sorted(unknown)[0]!r}", "[[rule]] tables, layout_budget and rows")
        listed = table.get("rule", [])
        if not isinstance(listed, list):
            raise _malformed(origin, "rule is not a list", "[[rule]] tables")
        rules = tuple(_parse_rule(item, f"{origin}: rule {number}") for number, item in enumerate(listed, 1))
        budget = parse_bytes(table.get("layout_budget", 0), f"{origin}: layout_budget")
        return cls(rules, budget, _parse_rows(table.get("rows", list(ROW_BUCKETS)), f"{origin}: rows"))

    @classmethod
    def from_toml(cls, path: Path) -> Policy:
        """
        Read a policy file.

        Raises:
            PlanError: `QP-PLAN-POLICY` when the file is missing, not TOML, or malformed.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise _malformed(str(path), f"cannot be read ({error.strerror})", "a TOML file") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise _malformed(str(path), f"is not TOML ({error})", "a TOML file") from error
        return cls.parse(table, str(path))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Policy:
        """Read the file that `QUANTPLUG_POLICY` names; an empty policy when it is unset or empty."""
        path = environ.get("QUANTPLUG_POLICY", "")
        return cls.from_toml(Path(path)) if path else cls()


def parse_bytes(value: object, origin: str) -> int:
    """
    Return a number of bytes from itself or from a text such as "4 GB" (powers of 1000).

    Raises:
        PlanError: `QP-PLAN-POLICY` when it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise _malformed(origin, f"is {value!r}", 'bytes, or a text such as "500 MB" or "4 GB"')
    return int(float(found["number"]) * _UNITS[found["unit"].upper()])


def _parse_rows(value: object, origin: str) -> tuple[int, ...]:
    return tuple(sorted(set(_check_rows(value, origin))))


def _check_rows(value: object, origin: str) -> list[int]:
    listed = value if isinstance(value, list) else []
    if not listed or any(not isinstance(m, int) or isinstance(m, bool) or not 0 < m <= _MOST_ROWS for m in listed):
        raise _malformed(origin, f"is {value!r}", f"a list of numbers from 1 to {_MOST_ROWS}, such as [1, 16, 2048]")
    return listed


def _parse_rule(item: object, origin: str) -> PolicyRule:
    if not isinstance(item, dict):
        raise _malformed(origin, "is not a table", _EXAMPLE)
    wishes = [wish for wish in _WISHES if wish in item]
    unknown = set(item) - {"match", *_WISHES}
    if unknown:
        raise _malformed(origin, f"unknown key {sorted(unknown)[0]!r}", "match and one of pin, prefer, allow, deny")
    if len(wishes) != 1:
        raise _malformed(origin, f"has {' and '.join(wishes) or 'no wish'}", "exactly one of pin, prefer, allow, deny")
    wish = wishes[0]
    kernels = [item[wish]] if isinstance(item[wish], str) else item[wish]
    if not isinstance(kernels, list) or not kernels or not all(isinstance(k, str) and k for k in kernels):
        raise _malformed(origin, f"{wish} is {item[wish]!r}", "a kernel name, or a list of names or globs")
    if wish == "pin" and len(kernels) != 1:
        raise _malformed(origin, f"pins {len(kernels)} kernels", "one; use prefer for several")
    match = item.get("match")
    if match is not None and not isinstance(match, str):
        raise _malformed(origin, f"match is {match!r}", "a path, a glob or re:EXPRESSION")
    return PolicyRule(wish, tuple(kernels), path_entries([match], origin)[0] if match else None, origin)


def _malformed(where: str, what: str, expected: str) -> PlanError:
    return PlanError("QP-PLAN-POLICY", where, what, expected=expected)
