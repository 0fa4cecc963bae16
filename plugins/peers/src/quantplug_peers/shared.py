"""
Rules that vLLM and SGLang have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug_peers.expressions import MalformedError, UnsureError, expression
from quantplug_peers.fields import objects, stays_whole, targets, texts
from quantplug_peers.matching import agreed, exact_or_expressions, shards, skipped, with_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantplug.jsonio import Json
    from quantplug.peers import PeerAnswer, PeerRules
    from quantplug.skip import RegexMode

LINEAR = "Linear"
_EXPERTS = "FusedMoE"


def guarded(build: Callable[[], PeerRules | None]) -> PeerRules | None:
    """Return rules; for a malformed expression those of an engine that stops, for one that may not run here none."""
    try:
        return build()
    except MalformedError:
        return lambda path, class_name: "error"
    except UnsureError:
        return None


def compressed_tensors(
    section: Mapping[str, Json], *, tails: bool, fused_name: bool, otherwise: PeerAnswer
) -> PeerRules | None:
    """
    Return the rules for a compressed-tensors section: ignored, or the target of some group.

    Args:
        section: the section.
        tails: whether an ignored text may be the last components of a path.
        fused_name: whether a fused layer may be listed under its own name.
        otherwise: what becomes of a layer that is no target.
    """
    ignored, wanted = texts(section, "ignore"), targets(section)
    if ignored is None or wanted is None:
        return None
    listed = exact_or_expressions(ignored, tails=tails)
    named = exact_or_expressions(wanted)
    classes = frozenset(wanted)

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        answer = with_shards(listed, path, fused_name=fused_name)
        if answer is not False:
            return skipped(answer)
        if (class_name or LINEAR) in classes or named(path) or any(map(named, shards(path))):
            return "quantized"
        return otherwise

    return rules


def dynamic(section: Mapping[str, Json], *, otherwise: PeerAnswer | None) -> PeerRules | None:
    """
    Return the rules of GPTQ's `dynamic`: the first expression that matches from the start of the path.

    Shards of a fused layer are not looked at: a rule on `q_proj` never reaches `qkv_proj`.
    """
    mapping = objects(section, "dynamic")
    if mapping is None:
        return None
    ordered = [
        (key.startswith("-:"), expression(key.removeprefix("-:" if key.startswith("-:") else "+:"), "match"))
        for key in mapping
    ]

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        for excluded, matches in ordered:
            if matches(path):
                return "dense" if excluded else "quantized"
        return otherwise

    return rules


def extra_config(section: Mapping[str, Json], mode: RegexMode) -> PeerRules | None:
    """Return the rules of auto-round's `extra_config`: a layer's own name, else the first expression that matches."""
    layers = objects(section, "extra_config")
    if layers is None:
        return None
    ordered = [(expression(key, mode), value) for key, value in layers.items()]

    def whole(path: str) -> bool:
        if path in layers:
            return stays_whole(layers[path])
        return next((stays_whole(value) for matches, value in ordered if matches(path)), False)

    def rules(path: str, class_name: str) -> PeerAnswer | None:
        parts = shards(path)
        answer = agreed(map(whole, parts)) if parts and path not in layers else whole(path)
        return None if answer is None else skipped(answer)

    return rules


def is_experts(path: str, class_name: str) -> bool:
    """Return whether a module is a layer of experts, which engines hold in a class of its own."""
    return class_name == _EXPERTS if class_name else path.rpartition(".")[2] == "experts"
