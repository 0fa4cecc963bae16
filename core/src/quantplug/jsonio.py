"""
JSON from files nobody trusts: size-capped, UTF-8 only, no duplicate keys, no NaN, no deep nesting.
"""

from __future__ import annotations

from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
