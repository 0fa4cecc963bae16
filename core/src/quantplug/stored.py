"""
What every format checks first: that a layer's stored tensors are there, in the dtypes and shapes that it declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from quantplug.spec import ParamSpec


def check_stored(specs: Iterable[ParamSpec], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """
    Check presence, dtype and shape of a layer's tensors; for `LinearScheme.decode`, which frameworks call, too.

    Args:
        specs: what the format declares for a layer of that size.
        tensors: `{suffix: tensor}`.
        where: path of the layer.

    Raises:
        CheckpointError: `QP-ST-MISSING`, `QP-ST-DTYPE`, `QP-ST-SHAPE`.
    """
    for spec in specs:
        tensor, name = tensors.get(spec.suffix), f"{where}.{spec.suffix}"
        if tensor is None:
            if spec.required:
                raise CheckpointError("QP-ST-MISSING", name, "is not there", expected="every tensor of the layer")
            continue
        dtype, shapes = str(tensor.dtype).removeprefix("torch."), (spec.shape, *spec.other_shapes)
        if dtype not in spec.dtypes:
            raise CheckpointError("QP-ST-DTYPE", name, f"dtype {dtype}", expected=" or ".join(spec.dtypes))
        if tuple(tensor.shape) not in shapes:
            raise CheckpointError(
                "QP-ST-SHAPE", name, f"shape {list(tensor.shape)}", expected=" or ".join(str(list(s)) for s in shapes)
            )
