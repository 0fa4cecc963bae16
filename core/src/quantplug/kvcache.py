"""
The stored scales of a cache of keys and values: recognised by name, handed over to whoever owns the cache.
"""

from __future__ import annotations

_OWN = frozenset({"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point"})
_OF_PROJECTIONS = frozenset({"output_scale", "output_zero_point"})
_PROJECTIONS = frozenset({"k_proj", "v_proj", "q_proj", "kv_proj", "qkv_proj"})


def is_kv_scale(tensor: str) -> bool:
    """
    Return whether a stored tensor is a scale of cached keys or values.

    Writers put `k_scale` and the like on the attention module, on an `attn` module in it, or on the projection; some
    call it the projection's `output_scale`. Older ones have one `kv_scale` for both.
    """
    path, _, suffix = tensor.rpartition(".")
    return suffix in _OWN or (suffix in _OF_PROJECTIONS and path.rpartition(".")[2] in _PROJECTIONS)
