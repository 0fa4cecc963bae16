"""Qwen3, dense and as a mixture of experts."""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, ExpertRules
from quantplug.names import Architecture
from quantplug_architectures.spellings import STACKED

QWEN3 = Architecture("qwen3", ("qwen3",))
QWEN3_MOE = Architecture("qwen3_moe", ("qwen3_moe",), experts=ExpertRules(("mlp.experts",), (PER_EXPERT, STACKED)))
