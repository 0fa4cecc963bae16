"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.config import Dialect
    from quantplug.scheme import LinearScheme

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_schemes() -> list[type[LinearScheme]]:
    """Return the number format: integers stored one per byte."""
    from quantplug_int8.scheme import Int8Scheme

    return [Int8Scheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the readers of plain INT8 configurations, and of those that are known and refused."""
    from quantplug_int8.bitsandbytes import BitsAndBytesDialect
    from quantplug_int8.dialect import PlainInt8Dialect

    return [PlainInt8Dialect(), BitsAndBytesDialect()]
