"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.config import Dialect

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the reader of ModelOpt configurations."""
    from quantplug_modelopt.dialect import ModelOptDialect

    return [ModelOptDialect()]
