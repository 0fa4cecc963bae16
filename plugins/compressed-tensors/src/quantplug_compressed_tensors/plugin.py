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
    """Return the pack-quantized number format."""
    from quantplug_compressed_tensors.scheme import PackScheme

    return [PackScheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the reader and writer of compressed-tensors configurations."""
    from quantplug_compressed_tensors.dialect import CompressedTensorsDialect

    return [CompressedTensorsDialect()]
