"""
Which stored layers make up a module that an engine fuses: `qkv_proj` out of `q_proj`, `k_proj` and `v_proj`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError, list_names

if TYPE_CHECKING:
    from collections.abc import Container

    from quantplug.names import Architecture


def shards_of(path: str, stored: Container[str], rules: Architecture) -> tuple[str, ...]:
    """
    Return the checkpoint paths that a module is stored as, in the order of its outputs.

    A shard that the family may leave out is taken from what stands in for it, which is then there twice:
    `k_proj` for keys and values where both are the same (`attention_k_eq_v`).

    Args:
        path: of the module, in checkpoint names.
        stored: module paths that have tensors.
        rules: of the model's family.

    Raises:
        CheckpointError: `QP-ST-MISSING` naming the shards that are neither stored nor allowed to be absent.
    """
    parent, dot, last = path.rpartition(".")
    parts = dict(rules.fused).get(last, ())
    if not parts or path in stored:
        return (path,)
    stand_ins = dict(rules.absent)
    found, lacking = [], []
    for part in parts:
        names = [f"{parent}{dot}{name}" for name in (part, stand_ins.get(part)) if name]
        name = next((name for name in names if name in stored), None)
        if name is None:
            lacking.append(names[0])
        else:
            found.append(name)
    if lacking:
        raise CheckpointError(
            "QP-ST-MISSING",
            path,
            f"the checkpoint has no tensors for {list_names(lacking)}",
            expected=f"each of {', '.join(parts)}, or a rule of family {rules.name} by which it may be absent",
            fix="The checkpoint is incomplete, or belongs to another family.",
        )
    return tuple(found)
