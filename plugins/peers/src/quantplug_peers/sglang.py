"""
SGLang 0.5.23: `is_layer_skipped` (quantization/utils.py) and the matchers of single formats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplug.peers import PeerReader
from quantplug_peers.fields import modelopt_list, stated, texts
from quantplug_peers.matching import (
    component_runs,
    exact_or_expressions,
    listed_child,
    skipped,
    stars,
    substrings,
    with_shards,
)
from quantplug_peers.shared import compressed_tensors, dynamic, extra_config, guarded, is_experts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.jsonio import Json
    from quantplug.peers import PeerAnswer, PeerRules

_ROOT = "model."


class SGLangReader(PeerReader):
    """The rules of SGLang, which fuses q, k and v, and gate and up."""

    name: ClassVar[str] = "sglang"
    version: ClassVar[str] = "0.5.23"
    fuses: ClassVar[bool] = True

    def reading(self, method: str, section: Mapping[str, Json]) -> PeerRules | None:
        """Return the rules for the formats whose matcher is known."""
        return guarded(lambda: self._rules(method, section))

    def _rules(self, method: str, section: Mapping[str, Json]) -> PeerRules | None:
        if method.startswith("modelopt"):
            return _modelopt(modelopt_list(section))
        match method:
            case "fp8":
                return in_runs(_both_roots(texts(section, "ignored_layers", "modules_to_not_convert")))
            case "blockwise_int8" | "mxfp4" | "w4afp8":
                return in_runs(texts(section, "ignored_layers", "modules_to_not_convert"))
            case "awq":
                return _anywhere(texts(section, "modules_to_not_convert"))
            case "compressed-tensors" | "compressed_tensors":
                return compressed_tensors(section, tails=True, fused_name=True, otherwise="error")
            case "w8a8_int8":
                return _resolved(texts(section, "ignore"), tails=True)
            case "quark":
                return _quark(texts(section, "exclude"))
            case "gptq" | "gptq_marlin" if not stated(section, "modules_in_block_to_quantize"):
                return dynamic(section, otherwise="quantized")
            case "auto-round" | "auto_round":
                return extra_config(section, "fullmatch")
            case "bitsandbytes":
                return _components(texts(section, "llm_int8_skip_modules"))
        return None


def in_runs(entries: Sequence[str] | None) -> PeerRules | None:
    """Runs of whole components; a fused layer's own name does not count, its shards must agree."""
    if entries is None:
        return None
    listed, child = component_runs(entries), listed_child(entries)
    return lambda path, class_name: skipped(child(path) or with_shards(listed, path, fused_name=False))


def _both_roots(entries: Sequence[str] | None) -> Sequence[str] | None:
    """Return every entry with and without the root of the model."""
    if entries is None:
        return None
    return [*entries, *(entry.removeprefix(_ROOT) if entry.startswith(_ROOT) else _ROOT + entry for entry in entries)]


def _modelopt(entries: Sequence[str] | None) -> PeerRules | None:
    """Linear layers: runs of components or `*`; experts: `*` only."""
    if entries is None:
        return None
    runs, patterns = in_runs(entries), stars(entries)
    if runs is None:
        return None

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        if not is_experts(path, class_name):
            answer = runs(path, class_name)
            if answer != "quantized":
                return answer
        return skipped(patterns(path))

    return rules


def _anywhere(entries: Sequence[str] | None) -> PeerRules | None:
    """Texts anywhere in a path; shards are not looked at."""
    if entries is None:
        return None
    listed = substrings(entries)
    return lambda path, class_name: skipped(listed(path))


def _resolved(entries: Sequence[str] | None, *, tails: bool) -> PeerRules | None:
    if entries is None:
        return None
    listed = exact_or_expressions(entries, tails=tails)
    return lambda path, class_name: skipped(with_shards(listed, path))


def _quark(entries: Sequence[str] | None) -> PeerRules | None:
    """Whole paths and `re:`; experts also when a part of theirs is listed."""
    if entries is None:
        return None
    listed = exact_or_expressions(entries)

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        if is_experts(path, class_name) and any(entry.startswith(f"{path}.") for entry in entries):
            return "dense"
        return skipped(with_shards(listed, path))

    return rules


def _components(entries: Sequence[str] | None) -> PeerRules | None:
    """Single components, or the first components of a path."""
    if entries is None:
        return None
    names = frozenset(entries)

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        parts = path.split(".")
        heads = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return skipped(not names.isdisjoint(parts) or any(head in names for head in heads))

    return rules
