"""
Transformers 5.23: `should_convert_module` (quantizers/quantizers_utils.py) over one list per method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplug.peers import PeerReader
from quantplug_peers.fields import targets, texts
from quantplug_peers.matching import bounded_expressions, exact_or_expressions, skipped
from quantplug_peers.shared import LINEAR, guarded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.jsonio import Json
    from quantplug.peers import PeerAnswer, PeerRules

_LISTS = {
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "mxfp8": ("modules_to_not_convert", "ignored_layers"),
    "fbgemm_fp8": ("modules_to_not_convert",),
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
}
"""Method -> keys of its list. Methods whose layers another library chooses (GPTQ, Quark, auto-round) are not here."""


class TransformersReader(PeerReader):
    """The rules of Transformers, which runs layers unfused."""

    name: ClassVar[str] = "transformers"
    version: ClassVar[str] = "5.23"

    def reading(self, method: str, section: Mapping[str, Json]) -> PeerRules | None:
        """Return the rules for a method whose layers Transformers, or compressed-tensors for it, chooses by name."""
        if method in ("compressed-tensors", "compressed_tensors"):
            return guarded(lambda: _matched(section))
        if method not in _LISTS:
            return None
        listed = texts(section, *_LISTS[method])
        return None if listed is None else guarded(lambda: _listed(listed))


def _listed(entries: Sequence[str]) -> PeerRules:
    matches = bounded_expressions(entries)
    return lambda path, class_name: skipped(matches(path))


def _matched(section: Mapping[str, Json]) -> PeerRules | None:
    """Return the rules of compressed-tensors 0.20's `match_named_modules`: whole names, `re:`, classes as targets."""
    ignored, wanted = texts(section, "ignore"), targets(section)
    if ignored is None or wanted is None:
        return None
    listed, named, classes = exact_or_expressions(ignored), exact_or_expressions(wanted), frozenset(wanted)

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        if listed(path) or class_name in ignored:
            return "dense"
        return "quantized" if (class_name or LINEAR) in classes or named(path) else "dense"

    return rules
