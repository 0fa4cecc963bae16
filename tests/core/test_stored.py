"""What every format checks first about a layer's stored tensors."""

from __future__ import annotations

import pytest
import torch

from quantplug.errors import CheckpointError
from quantplug.spec import ParamSpec
from quantplug.stored import check_stored

SPECS = (
    ParamSpec("codes", (4, 8), ("uint8",)),
    ParamSpec("scale", (), ("float32", "bfloat16"), other_shapes=((1,), (1, 1))),
    ParamSpec("order", (8,), ("int32",), required=False),
)
CODES = torch.zeros(4, 8, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_declared_passes_in_every_shape_and_dtype_and_optional_tensors_may_lack(shape, dtype):
    check_stored(SPECS, {"codes": CODES, "scale": torch.ones(shape, dtype=dtype)}, "a.b")


@pytest.mark.parametrize(
    ("changes", "code", "where", "expected"),
    [
        ({"scale": None}, "QP-ST-MISSING", "a.b.scale", "every tensor of the layer"),
        ({"codes": CODES.to(torch.int8)}, "QP-ST-DTYPE", "a.b.codes", "uint8"),
        ({"scale": torch.ones(2)}, "QP-ST-SHAPE", "a.b.scale", "[] or [1] or [1, 1]"),
        ({"order": torch.zeros(9, dtype=torch.int32)}, "QP-ST-SHAPE", "a.b.order", "[8]"),
    ],
)
def test_everything_else_is_refused_by_name(changes, code, where, expected):
    tensors = {"codes": CODES, "scale": torch.ones(()), **changes}
    with pytest.raises(CheckpointError) as raised:
        check_stored(SPECS, {name: t for name, t in tensors.items() if t is not None}, "a.b")
    assert (raised.value.code, raised.value.where, raised.value.expected) == (code, where, expected)
