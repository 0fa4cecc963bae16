"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.config import Dialect

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the reader of Quark configurations."""
    from quantplug_quark.dialect import QuarkDialect

    return [QuarkDialect()]
