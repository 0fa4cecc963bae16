"""
What the stored values of a pack-quantized layer must satisfy, and errors that name the element which does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    from quantplug.spec import LinearShape

_DAMAGED = "The file was damaged or quantized wrongly; download it again or ask its maker."


def check_size(stored: torch.Tensor, shape: LinearShape, where: str) -> None:
    """
    Check that `weight_shape` `[2]` is the size that the layer was planned with.

    Raises:
        CheckpointError: `QP-ST-SHAPE`.
    """
    found, wanted = stored.tolist(), [shape.out_features, shape.in_features]
    if found != wanted:
        raise CheckpointError(
            "QP-ST-SHAPE",
            f"{where}.weight_shape",
            f"says {found}",
            expected=f"{wanted}, as the packed codes and scales have it",
            fix="Where the last word or group of a row is not full, only the model's own size tells; plan with the "
            "model. Otherwise the file is damaged, or bits and group_size are not what the configuration says.",
        )


def check_scales(scales: torch.Tensor, name: str) -> None:
    """
    Check that scales are finite. Negative ones are real (q4_0 has them), zeros are harmless.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    finite = torch.isfinite(scales)
    if bool(finite.all()):
        return
    faults = torch.nonzero(~finite)
    place = [int(index) for index in faults[0]]
    raise CheckpointError(
        "QP-ST-SCALE",
        f"{name}{place}",
        f"is {scales[tuple(place)].item()} ({len(faults)} of {scales.numel()} are not finite)",
        expected="finite scales",
        fix=_DAMAGED,
    )


def check_input_scale(scale: torch.Tensor, name: str) -> None:
    """
    Check that the stored scale of x is positive and finite: x is divided by it.

    Raises:
        CheckpointError: `QP-ST-SCALE`.
    """
    value = float(scale)
    if not 0 < value < float("inf"):
        raise CheckpointError("QP-ST-SCALE", name, f"is {value}", expected="a finite positive number", fix=_DAMAGED)


def check_unused(fields: torch.Tensor, first: int, name: str) -> None:
    """
    Check that the fields uint8 `[R, F]` behind the last code of each row are 0.

    Args:
        fields: what was read past the stored codes.
        first: index of the first of them.
        name: tensor name.

    Raises:
        CheckpointError: `QP-ST-PADDING`.
    """
    if not bool(fields.any()):
        return
    row, field = (int(index) for index in torch.nonzero(fields)[0])
    raise CheckpointError(
        "QP-ST-PADDING",
        name,
        f"field {first + field} of row {row} holds {int(fields[row, field])}",
        expected=f"0 in every field from {first} on, where no code is stored",
        fix="The layer's size or bits are not what the configuration says, or the file is damaged.",
    )


def check_zeros(zeros: torch.Tensor, bits: int, name: str) -> None:
    """
    Check that unpacked zero points, int8, are numbers of that many bits.

    Raises:
        CheckpointError: `QP-ST-ZEROS`.
    """
    half = 1 << (bits - 1)
    low, high = (int(value) for value in zeros.aminmax())
    if low < -half or high >= half:
        raise CheckpointError(
            "QP-ST-ZEROS",
            name,
            f"is {low if low < -half else high}",
            expected=f"{-half} to {half - 1}, as {bits} bits have it",
            fix=_DAMAGED,
        )


def group_index(stored: torch.Tensor, inputs: int, group_size: int, groups: int, where: str) -> torch.Tensor | None:
    """
    Return the group of each input, int32 `[K]`, or None when it is the trivial `k // group_size`.

    A tensor of -1 was never filled in by its writer, and counts as trivial.

    Args:
        stored: the file's `weight_g_idx`.
        inputs: K.
        group_size: inputs per group.
        groups: G.
        where: the layer.

    Raises:
        CheckpointError: `QP-ST-GIDX`.
    """
    trivial = torch.arange(inputs, dtype=torch.int32) // group_size
    if bool((stored == -1).all()) or torch.equal(stored, trivial):
        return None
    name = f"{where}.weight_g_idx"
    outside = (stored < 0) | (stored >= groups)
    if bool(outside.any()):
        at = int(torch.nonzero(outside)[0])
        raise CheckpointError(
            "QP-ST-GIDX",
            f"{name}[{at}]",
            f"is {int(stored[at])}",
            expected=f"a group from 0 to {groups - 1}, or -1 in every place for the trivial order",
            fix=_DAMAGED,
        )
    unused = torch.nonzero(torch.bincount(stored, minlength=groups) == 0)
    if len(unused):
        raise CheckpointError(
            "QP-ST-GIDX",
            name,
            f"leaves {len(unused)} of {groups} groups without an input, the first of them {int(unused[0])}",
            expected="every group to be used",
            fix="The file is damaged, or group_size is not what the configuration says.",
        )
    return stored
