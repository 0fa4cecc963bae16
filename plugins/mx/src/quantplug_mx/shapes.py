"""
From the shapes of stored tensors to the size of a layer, or to an error that says which layout they look like.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from quantplug.spec import ParamSpec

Size = tuple[int, ...]

_TILE_ROWS, _TILE_GROUPS = 128, 4
"""What matrix units that read scaled codes pad scales to, in whose order within a tile the scales then lie."""


def check_suffixes(stored: Collection[str], specs: Iterable[ParamSpec], where: str, scheme: str) -> None:
    """
    Check that a layer stores what its format needs, and nothing that belongs to another spelling of it.

    Args:
        stored: suffixes of the layer's tensors, of those that any spelling of the format has.
        specs: what this spelling has.
        where: the layer.
        scheme: the format in words.

    Raises:
        CheckpointError: `QP-ST-MISSING`, `QP-ST-EXTRA`.
    """
    specs = tuple(specs)
    for spec in specs:
        if spec.required and spec.suffix not in stored:
            raise CheckpointError(
                "QP-ST-MISSING", f"{where}.{spec.suffix}", "is not there", expected=f"every tensor of {scheme}"
            )
    own = {spec.suffix for spec in specs}
    for suffix in sorted(set(stored) - own):
        raise CheckpointError(
            "QP-ST-EXTRA",
            f"{where}.{suffix}",
            f"is stored beside {', '.join(sorted(own & set(stored)))}",
            expected=f"nothing but the tensors of {scheme}",
            fix="The configuration describes another spelling of this format, or the file was merged from two.",
        )


def matrix(stored: Mapping[str, Size], suffix: str, where: str) -> tuple[int, int]:
    """Return the two sizes of a stored matrix; raises `CheckpointError` (`QP-ST-SHAPE`) for another rank."""
    size = stored[suffix]
    if len(size) != 2:
        raise CheckpointError("QP-ST-SHAPE", f"{where}.{suffix}", f"shape {list(size)}", expected="two dimensions")
    return size[0], size[1]


def check_shapes(stored: Mapping[str, Size], specs: Iterable[ParamSpec], where: str, scheme: str) -> None:
    """
    Check every stored shape against what the format has for a layer of that size.

    Raises:
        CheckpointError: `QP-ST-SHAPE`, with what the shape looks like.
    """
    for spec in specs:
        found = stored.get(spec.suffix, spec.shape)
        if found in (spec.shape, *spec.other_shapes):
            continue
        raise CheckpointError(
            "QP-ST-SHAPE",
            f"{where}.{spec.suffix}",
            f"shape {list(found)}",
            expected=f"{list(spec.shape)} for {scheme}",
            fix=_likeness(found, spec.shape),
        )


def _likeness(found: Size, wanted: Size) -> str:
    if len(wanted) != 2:
        return "It is one number per layer; the file may be of another format."
    rows, groups = wanted
    padded = (_padded(rows, _TILE_ROWS), _padded(groups, _TILE_GROUPS))
    if found == (groups, rows):
        return "That is transposed; ask the file's maker."
    if prod(found) == prod(padded) != prod(wanted):
        return (
            f"That is padded to multiples of {_TILE_ROWS} x {_TILE_GROUPS}, as some GPU kernels hold scales, in an "
            "order of their own; use a copy whose scales lie as the format defines."
        )
    if prod(found) == prod(wanted):
        return "It has as many elements, in another shape, which does not say in which order; ask the file's maker."
    return "The configuration describes another format or another group size, or the file is damaged."


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
