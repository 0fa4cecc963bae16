"""
What the stored values of a GPTQ layer must satisfy, and errors that name the element which does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    pass


def check_scales(scales: torch.Tensor, where: str) -> None:
    """
    Check that scales `[G, N]` are finite. Negative ones are real (auto-round writes them), zeros are harmless.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    finite = torch.isfinite(scales)
    if bool(finite.all()):
        return
    faults = torch.nonzero(~finite)
    group, row = (int(i) for i in faults[0])
    raise CheckpointError(
        "QP-ST-SCALE",
        f"{where}.scales[{group}, {row}]",
        f"is {scales[group, row].item()} ({len(faults)} of {scales.numel()} are not finite)",
        expected="finite scales",
        fix="The file was damaged or quantized wrongly; download it again or ask its maker.",
    )


def check_unused(fields: torch.Tensor, first: int, name: str) -> None:
    """
    Check that the fields `[F, …]` beyond the last code are 0.

    Args:
        fields: what was read past the stored codes.
        first: index of the first of them.
        name: tensor name.

    Raises:
        CheckpointError: `QP-ST-PADDING`.
    """
    if not bool(fields.any()):
        return
    field, stream = (int(i) for i in torch.nonzero(fields)[0])
    raise CheckpointError(
        "QP-ST-PADDING",
        name,
        f"field {first + field} of stream {stream} holds {int(fields[field, stream])}",
        expected=f"0 in every field from {first} on, where no code is stored",
        fix="The layer's size or bits are not what the configuration says, or the file is damaged.",
    )


def check_symmetric(zeros: torch.Tensor, bits: int, *, v2: bool, where: str) -> None:
    """
    Check that every zero point `[N, G]` is the middle one, as a symmetric file promises.

    Raises:
        CheckpointError: `QP-ST-ZEROS` that says what is there and what that usually means.
    """
    middle, mask = 1 << (bits - 1), (1 << bits) - 1
    wrong = zeros != middle
    if not bool(wrong.any()):
        return
    row, group = (int(i) for i in torch.nonzero(wrong)[0])
    stored = zeros if v2 else (zeros - 1) & mask
    found = int(stored[row, group])
    other = middle - 1 if v2 else middle
    if bool((stored == other).all()):
        fix = (
            f"Every one is {other}: the file looks like checkpoint_format {'gptq' if v2 else 'gptq_v2'}; correct that."
        )
    elif bool((stored == found).all()):
        fix = f"Every one is {found}: the file is of another kind than its configuration says; ask its maker."
    else:
        fix = "They vary: the file looks asymmetric; correct sym to false if it is."
    raise CheckpointError(
        "QP-ST-ZEROS",
        f"{where}.qzeros",
        f"stores {found} for group {group}, row {row}",
        expected=f"{middle if v2 else middle - 1} everywhere, because sym is true and checkpoint_format is "
        f"{'gptq_v2' if v2 else 'gptq'}",
        fix=fix,
    )


def group_index(
    stored: torch.Tensor | None, inputs: int, group_size: int, groups: int, *, desc_act: bool, where: str
) -> torch.Tensor | None:
    """
    Return the group of each input, int32 `[K]`, or None when it is the trivial `k // group_size`.

    A tensor of zeros in a file without desc_act was never filled in by its writer, and counts as trivial.

    Args:
        stored: the file's `g_idx`, or None.
        inputs: K.
        group_size: inputs per group.
        groups: G.
        desc_act: whether the file announces another order.
        where: the layer.

    Raises:
        CheckpointError: `QP-ST-GIDX`.
    """
    if stored is None:
        return None
    trivial = torch.arange(inputs, dtype=torch.int32) // group_size
    if torch.equal(stored, trivial) or (not desc_act and not bool(stored.any())):
        return None
    outside = (stored < 0) | (stored >= groups)
    if bool(outside.any()):
        at = int(torch.nonzero(outside)[0])
        raise CheckpointError(
            "QP-ST-GIDX",
            f"{where}.g_idx[{at}]",
            f"is {int(stored[at])}",
            expected=f"a group from 0 to {groups - 1}",
            fix="The file is damaged, or group_size is not what the configuration says.",
        )
    unused = torch.nonzero(torch.bincount(stored, minlength=groups) == 0)
    if len(unused):
        raise CheckpointError(
            "QP-ST-GIDX",
            f"{where}.g_idx",
            f"leaves {len(unused)} of {groups} groups without an input, the first of them {int(unused[0])}",
            expected="every group to be used",
            fix="The file is damaged, or group_size is not what the configuration says.",
        )
    if not desc_act:
        at = int(torch.nonzero(stored != trivial)[0])
        raise CheckpointError(
            "QP-ST-GIDX",
            f"{where}.g_idx[{at}]",
            f"is {int(stored[at])}, which is another order than the configuration's desc_act false",
            expected=f"{int(trivial[at])}, the input's own group",
            fix="Correct desc_act to true if the file was made with act-order.",
        )
    return stored
