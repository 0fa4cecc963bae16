"""What the operators of torch say of their results without running, and how arguments of kernels are packed."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import torch

from quantplug_marlin import launch, mixture, side


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_operators_know_shapes_and_dtypes_without_a_gpu():
    codes, scales = meta(20, 8, 512, dtype=torch.uint8), meta(20, 4, 8, 2, dtype=torch.float16)
    y = launch.linear(meta(3, 512), codes, scales, None, None, None, None, 310, 0)
    assert (y.shape, y.dtype) == ((3, 310), torch.bfloat16)
    values = launch.dequantize(codes, scales, None, None, None, 310, 512, 0, False, torch.float32)
    assert (values.shape, values.dtype) == ((310, 512), torch.float32)
    ids, weights = meta(3, 2, dtype=torch.int64), meta(3, 2, dtype=torch.float32)
    stacked = meta(4, 20, 8, 512, dtype=torch.uint8)
    none = (None, None, None, None)
    y = mixture.experts(meta(3, 512), weights, ids, None, stacked, *none, stacked, *none, [4] * 8, [0.0] * 3)
    assert (y.shape, y.dtype) == ((3, 512), torch.bfloat16)


def fields_of(file: str, *, experts: bool) -> str:
    """Return the members of `struct Args` in a source as `struct` spells them."""
    text = files("quantplug_marlin").joinpath("cuda", file).read_text(encoding="utf-8")
    body = re.search(r"struct Args \{(.*?)\n\};", text, re.DOTALL)[1]
    if not experts:
        body = re.sub(r"#if EXPERTS.*?#endif", "", body, flags=re.DOTALL)
    members = re.findall(r"^ +((?:const )?(?:long long|\w+)\*?) ([\w, ]+);", body, re.MULTILINE)
    kinds = {"long long": "q", "int": "i", "float": "f", "Map": ""}
    return "".join(("P" if kind.endswith("*") else kinds[kind]) * len(names.split(",")) for kind, names in members)


@pytest.mark.parametrize(
    ("file", "packed", "experts"),
    [
        ("multiply.cu", launch._MULTIPLY, False),
        ("multiply.cu", side.MULTIPLY, True),
        ("warpgroup.cu", launch._MULTIPLY_BOXES, False),
        ("warpgroup.cu", side.MULTIPLY_BOXES, True),
        ("gather.cu", launch._GATHER, False),
        ("shares.cu", launch._SHARES, False),
        ("dense.cu", launch._DENSE, False),
        ("route.cu", mixture._ROUTE, False),
        ("rows.cu", mixture._ROWS, False),
        ("combine.cu", mixture._COMBINE, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_are_packed_as_the_source_declares_them(file, packed, experts):
    spelled = re.sub(r"(\d+)(\w)", lambda m: m[2] * int(m[1]), packed.format)
    assert spelled.rstrip("x") == fields_of(file, experts=experts)
    alignment = 64 if file == "warpgroup.cu" else 8
    assert packed.size % alignment == 0
