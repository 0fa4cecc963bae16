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
    """Return MXFP8, MXFP4 and NVFP4."""
    from quantplug_mx.mxfp4 import MXFP4Scheme
    from quantplug_mx.mxfp8 import MXFP8Scheme
    from quantplug_mx.nvfp4 import NVFP4Scheme

    return [MXFP8Scheme, MXFP4Scheme, NVFP4Scheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the readers of configurations whose method is `mxfp8` or `mxfp4`."""
    from quantplug_mx.dialect import MXFP4Dialect, MXFP8Dialect

    return [MXFP8Dialect(), MXFP4Dialect()]
