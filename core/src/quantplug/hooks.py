"""
The pluggy hooks of a quantplug plugin.

A distribution names one light module under the entry-point group `quantplug.plugins`; that module (by custom
`plugin.py`) imports the core only, says `quantplug_api = ">=1,<2"`, and implements any of these functions with
`@hookimpl`. Each is called once, while plugins are discovered, so it imports nothing heavy, and returns a fresh list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.config import Dialect
    from quantplug.detect import PlatformProvider
    from quantplug.host import Host
    from quantplug.moekernel import Kernel
    from quantplug.names import Architecture
    from quantplug.peers import PeerReader
    from quantplug.scheme import LinearScheme

API_VERSION = "1.0"
"""The version of these hooks that this core speaks; a plugin's `quantplug_api` must contain it."""

GROUP = "quantplug.plugins"
"""The entry-point group."""

hookspec = pluggy.HookspecMarker("quantplug")
hookimpl = pluggy.HookimplMarker("quantplug")


@hookspec
def quantplug_schemes() -> Sequence[type[LinearScheme]]:
    """Return the number formats this plugin reads, as classes."""
    raise NotImplementedError


@hookspec
def quantplug_dialects() -> Sequence[Dialect]:
    """Return the readers of configuration spellings this plugin brings."""
    raise NotImplementedError


@hookspec
def quantplug_kernels() -> Sequence[Kernel]:
    """Return the kernels this plugin brings, for linear layers and for experts, one instance each."""
    raise NotImplementedError


@hookspec
def quantplug_platforms() -> Sequence[PlatformProvider]:
    """Return the kinds of machine this plugin can recognise."""
    raise NotImplementedError


@hookspec
def quantplug_architectures() -> Sequence[Architecture]:
    """Return the checkpoint name rules of model families."""
    raise NotImplementedError


@hookspec
def quantplug_hosts() -> Sequence[Host]:
    """Return the frameworks through which this plugin can run a whole model."""
    raise NotImplementedError


@hookspec
def quantplug_peers() -> Sequence[PeerReader]:
    """Return the rules of other engines that this plugin knows, for `lint` to compare with."""
    raise NotImplementedError
