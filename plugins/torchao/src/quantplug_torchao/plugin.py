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
    """Return the number format: the tensors that torchao takes its weight classes apart into."""
    from quantplug_torchao.scheme import TorchaoScheme

    return [TorchaoScheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the reader of torchao configurations."""
    from quantplug_torchao.dialect import TorchaoDialect

    return [TorchaoDialect()]
