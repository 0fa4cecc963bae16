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
    """Return the FP8 number format."""
    from quantplug_fp8.scheme import FP8Scheme

    return [FP8Scheme]


@hookimpl
def quantplug_dialects() -> list[Dialect]:
    """Return the readers of `fp8` and `fbgemm_fp8` configurations."""
    from quantplug_fp8.dialect import FP8Dialect
    from quantplug_fp8.fbgemm import FbgemmDialect

    return [FP8Dialect(), FbgemmDialect()]
