"""
What the stored values of an AWQ layer must satisfy, and errors that name the element which does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    pass

_FIX = "The file was damaged or quantized wrongly; download it again or ask its maker."
MIDDLE = 8


def check_scales(scales: torch.Tensor, name: str) -> None:
    """
    Check that scales are finite; 0 and negative ones have a plain meaning.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    finite = scales.isfinite()
    if bool(finite.all()):
        return
    places = (~finite).nonzero()
    place = places[0].tolist()
    raise CheckpointError(
        "QP-ST-SCALE",
        f"{name}{place}",
        f"is {scales[tuple(place)].item()} ({len(places)} of {scales.numel()} are not finite)",
        expected="finite scales",
        fix=_FIX,
    )


def check_unused(values: torch.Tensor, first: int, name: str) -> None:
    """
    Check that what lies beyond the last group is 0.

    Args:
        values: `[N, F]`, what was read there.
        first: index of its first column.
        name: tensor name.

    Raises:
        CheckpointError: `QP-ST-PADDING`.
    """
    if not bool(values.any()):
        return
    row, column = values.nonzero()[0].tolist()
    raise CheckpointError(
        "QP-ST-PADDING",
        f"{name}[{row}]",
        f"holds {values[row, column].item()} for group {first + column}",
        expected=f"0 from group {first} on, where there is none",
        fix="group_size is not what the configuration says, or the file is damaged.",
    )


def check_symmetric(zeros: torch.Tensor, name: str) -> None:
    """
    Check that every zero point `[N, G]` is the middle one, as a file without zero points promises.

    Raises:
        CheckpointError: `QP-ST-ZEROS`.
    """
    wrong = zeros != MIDDLE
    if not bool(wrong.any()):
        return
    row, group = wrong.nonzero()[0].tolist()
    raise CheckpointError(
        "QP-ST-ZEROS",
        name,
        f"stores {int(zeros[row, group])} for group {group}, row {row} ({int(wrong.sum())} of {zeros.numel()} differ)",
        expected=f"{MIDDLE} everywhere, because zero_point is false",
        fix="Correct zero_point to true if the file is asymmetric; that reads symmetric files rightly, too.",
    )
