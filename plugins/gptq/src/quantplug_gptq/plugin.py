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
    """Return the GPTQ number format."""
    from quantplug_gptq.scheme import GPTQScheme

    return [GPTQScheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the reader of GPTQ configurations."""
    from quantplug_gptq.dialect import GPTQDialect

    return [GPTQDialect()]
