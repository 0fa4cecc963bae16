"""
Quantized checkpoints in Transformers, through quantplug.

`from_pretrained` gives an ordinary `PreTrainedModel`. Importing this package imports neither torch nor transformers;
the first use of one of its names does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantplug_transformers.loading import from_pretrained
    from quantplug_transformers.quantizer import register

__all__ = ["from_pretrained", "register"]

_HOMES = {"from_pretrained": "loading", "register": "quantizer"}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from quantplug_transformers.versions import require_transformers

    require_transformers()
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]
