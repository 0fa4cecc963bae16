"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.peers import PeerReader

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_peers() -> list[PeerReader]:
    """Return the rules of Transformers, vLLM and SGLang."""
    from quantplug_peers.sglang import SGLangReader
    from quantplug_peers.transformers import TransformersReader
    from quantplug_peers.vllm import VLLMReader

    return [TransformersReader(), VLLMReader(), SGLangReader()]
