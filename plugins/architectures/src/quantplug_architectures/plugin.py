"""The hooks of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.hooks import hookimpl

if TYPE_CHECKING:
    from quantplug.names import Architecture

quantplug_api = ">=1,<2"


@hookimpl
def quantplug_architectures() -> list[Architecture]:
    """Return the families that are described here."""
    from quantplug_architectures.deepseek import DEEPSEEK
    from quantplug_architectures.gemma4 import GEMMA4
    from quantplug_architectures.glm4_moe import GLM4_MOE
    from quantplug_architectures.gpt_oss import GPT_OSS
    from quantplug_architectures.llama import LLAMA
    from quantplug_architectures.llama4 import LLAMA4
    from quantplug_architectures.mixtral import MIXTRAL
    from quantplug_architectures.qwen3 import QWEN3, QWEN3_MOE

    return [DEEPSEEK, GEMMA4, GLM4_MOE, GPT_OSS, LLAMA, LLAMA4, MIXTRAL, QWEN3, QWEN3_MOE]
