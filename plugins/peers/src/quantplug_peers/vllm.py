"""
vLLM 0.33.0: `is_layer_skipped` in its modes (quantization/utils/quant_utils.py) and the matchers of single formats.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, ClassVar

from quantplug.peers import PeerReader
from quantplug_peers.fields import flattened, modelopt_list, stated, texts
from quantplug_peers.matching import (
    agreed,
    exact,
    exact_or_expressions,
    listed_child,
    shards,
    skipped,
    substrings,
    with_shards,
)
from quantplug_peers.shared import compressed_tensors, dynamic, extra_config, guarded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.jsonio import Json
    from quantplug.peers import PeerAnswer, PeerRules

_POSITIVE = "modules_in_block_to_quantize"
_TOWERS = ("vision_tower", "vision_model", "visual")
_GLOB = frozenset("*?[")


class VLLMReader(PeerReader):
    """The rules of vLLM, which fuses q, k and v, and gate and up."""

    name: ClassVar[str] = "vllm"
    version: ClassVar[str] = "0.33.0"
    fuses: ClassVar[bool] = True

    def reading(self, method: str, section: Mapping[str, Json]) -> PeerRules | None:
        """Return the rules for the formats whose matcher is known."""
        return guarded(lambda: self._rules(method, section))

    def _rules(self, method: str, section: Mapping[str, Json]) -> PeerRules | None:
        if method.startswith("modelopt"):
            return _modelopt(modelopt_list(section))
        match method:
            case "fp8" | "mxfp4":
                return in_exact_mode(texts(section, "ignored_layers", "modules_to_not_convert"))
            case "fbgemm_fp8":
                return in_exact_mode(texts(section, "modules_to_not_convert"))
            case "awq" if stated(section, "modules_to_not_convert"):
                # Without a list it takes the layers that are stored dense, and so never differs from what is stored.
                return in_substring_mode(texts(section, "modules_to_not_convert"))
            case "compressed-tensors" | "compressed_tensors":
                return compressed_tensors(section, tails=False, fused_name=True, otherwise="dense")
            case "quark":
                return _quark(texts(section, "exclude"))
            case "gptq" | "gptq_marlin":
                return _gptq(section)
            case "auto-round" | "auto_round" | "inc":
                return extra_config(section, "search")
        return None


def in_exact_mode(entries: Sequence[str] | None) -> PeerRules | None:
    """Whole paths only; of experts, any listed part skips them all."""
    if entries is None:
        return None
    listed, child = exact(entries), listed_child(entries)
    return lambda path, class_name: skipped(child(path) or with_shards(listed, path))


def in_substring_mode(entries: Sequence[str] | None) -> PeerRules | None:
    """Texts anywhere in a path, also within a component."""
    if entries is None:
        return None
    listed = substrings(entries)
    return lambda path, class_name: skipped(with_shards(listed, path))


def _modelopt(entries: Sequence[str] | None) -> PeerRules | None:
    """Exact mode first, whose shards must agree; then texts anywhere; then globs. Vision towers are never quantized."""
    if entries is None:
        return None
    first = in_exact_mode(entries)
    anywhere = substrings(entries)
    globs = [entry for entry in entries if _GLOB.intersection(entry)]
    if first is None:
        return None

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        answer = first(path, class_name)
        if answer != "quantized":
            return answer
        inner = path.removeprefix("language_model.")
        if anywhere(path) or anywhere(inner) or any(fnmatch(path, glob) for glob in globs):
            return "dense"
        return "dense" if any(tower in path for tower in _TOWERS) else "quantized"

    return rules


def _quark(entries: Sequence[str] | None) -> PeerRules | None:
    if entries is None:
        return None
    listed = exact_or_expressions(entries)
    return lambda path, class_name: skipped(with_shards(listed, path))


def _gptq(section: Mapping[str, Json]) -> PeerRules | None:
    """
    `dynamic` first; then the positive list, whose texts may stand anywhere in a path.

    Without that list vLLM takes the layers that are stored quantized, and so never differs from what is stored.
    """
    changed = dynamic(section, otherwise=None)
    positive = flattened(section[_POSITIVE]) if section.get(_POSITIVE) else []
    if changed is None or positive is None:
        return None
    listed = substrings(positive)

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        answer = changed(path, class_name)
        if answer is not None or not positive:
            return answer
        parts = shards(path)
        chosen = agreed(map(listed, parts)) if parts else listed(path)
        return "error" if chosen is None else ("quantized" if chosen else "dense")

    return rules
