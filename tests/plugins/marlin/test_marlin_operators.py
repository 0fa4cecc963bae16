"""What the operators of torch say of their results without running, and how arguments of kernels are packed."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import torch

from quantplug_marlin import float8mixture, launch, mixture, routing, rowcalls, side


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_operators_know_shapes_and_dtypes_without_a_gpu():
    codes, scales = meta(20, 8, 512, dtype=torch.uint8), meta(20, 4, 8, 2, dtype=torch.float16)
    y = launch.linear(meta(3, 512), codes, scales, None, None, None, None, 310, 0)
    assert (y.shape, y.dtype) == ((3, 310), torch.bfloat16)
    values = launch.dequantize(codes, scales, None, None, None, 310, 512, 0, False, torch.float32)
    assert (values.shape, values.dtype) == ((310, 512), torch.float32)
    rows, one = meta(320, 512, dtype=torch.float8_e4m3fn), meta(1, 1, dtype=torch.float32)
    y = rowcalls.linear_rows(meta(3, 500), rows, one, None, 310)
    assert (y.shape, y.dtype) == ((3, 310), torch.bfloat16)
    ids, weights = meta(3, 2, dtype=torch.int64), meta(3, 2, dtype=torch.float32)
    stacked = meta(4, 20, 8, 512, dtype=torch.uint8)
    none = (None, None, None, None)
    y = mixture.experts(meta(3, 512), weights, ids, None, stacked, *none, stacked, *none, [4] * 8, [0.0] * 3)
    assert (y.shape, y.dtype) == ((3, 512), torch.bfloat16)
    codes, scales = meta(4, 512, 512, dtype=torch.float8_e4m3fn), meta(4, 512, dtype=torch.float32)
    held = (codes, scales, None, codes, scales, None)
    y = float8mixture.float8_experts(meta(3, 512), weights, ids, None, *held, [512, 0, 0, 0, 0], [0.0] * 3)
    assert (y.shape, y.dtype) == ((3, 512), torch.bfloat16)


def fields_of(file: str, sections: tuple[str, ...]) -> str:
    """Return the members of `struct Args` in a source as `struct` spells them, with those of some `#if` sections."""
    text = files("quantplug_marlin").joinpath("cuda", file).read_text(encoding="utf-8")
    body = re.search(r"struct Args \{(.*?)\n\};", text, re.DOTALL)[1]
    for section in {"EXPERTS", "ROWS"} - set(sections):
        body = re.sub(rf"#if {section}.*?#endif", "", body, flags=re.DOTALL)
    members = re.findall(r"^ +((?:const )?(?:long long|\w+)\*?) ([\w, ]+);", body, re.MULTILINE)
    kinds = {"long long": "q", "int": "i", "float": "f", "Map": ""}
    return "".join(("P" if kind.endswith("*") else kinds[kind]) * len(names.split(",")) for kind, names in members)


@pytest.mark.parametrize(
    ("file", "packed", "sections"),
    [
        ("multiply.cu", launch._MULTIPLY, ()),
        ("multiply.cu", rowcalls._MULTIPLY, ("ROWS",)),
        ("multiply.cu", side.MULTIPLY, ("EXPERTS",)),
        ("warpgroup.cu", launch._MULTIPLY_BOXES, ()),
        ("warpgroup.cu", side.MULTIPLY_BOXES, ("EXPERTS",)),
        ("gather.cu", launch._GATHER, ()),
        ("shares.cu", launch._SHARES, ()),
        ("dense.cu", launch._DENSE, ()),
        ("route.cu", routing._ROUTE, ()),
        ("rows.cu", mixture._ROWS, ()),
        ("combine.cu", routing._COMBINE, ()),
        ("quantize.cu", float8mixture._QUANTIZE, ()),
        ("between.cu", float8mixture._BETWEEN, ()),
        ("float8.cu", float8mixture._MULTIPLY, ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_are_packed_as_the_source_declares_them(file, packed, sections):
    spelled = re.sub(r"(\d+)(\w)", lambda m: m[2] * int(m[1]), packed.format)
    assert spelled.rstrip("x") == fields_of(file, sections)
    alignment = 64 if file in {"warpgroup.cu", "float8.cu"} else 8
    assert packed.size % alignment == 0
