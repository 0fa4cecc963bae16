"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.host import Host

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_hosts() -> Sequence[Host]:
    """Return the host that runs checkpoints in Transformers."""
    from quantplug_transformers.host import TransformersHost

    return [TransformersHost()]
