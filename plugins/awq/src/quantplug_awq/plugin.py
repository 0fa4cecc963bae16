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
    """Return the AWQ number format."""
    from quantplug_awq.scheme import AWQScheme

    return [AWQScheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the reader of AWQ configurations."""
    from quantplug_awq.dialect import AWQDialect

    return [AWQDialect()]
