"""
The source of one kernel: what it is compiled for, and the files in `cuda/`.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def source_of(file: str, definitions: Mapping[str, int]) -> str:
    """Return a file of `cuda/` with all that it includes, below definitions."""
    lines = [f"#define {name} {value}" for name, value in definitions.items()]
    if file == "warpgroup.cu":
        lines.append(_warpgroup_step(definitions["TOKENS"], half=bool(definitions["HALF"])))
    if file == "float8.cu":
        lines.append(_float8_step(definitions["WIDE"] // definitions["PARTS"]))
    return "\n".join([*lines, _whole(file)])


@cache
def _whole(file: str) -> str:
    text = files("quantplug_marlin").joinpath("cuda", file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: _whole(found[1]), text)


def _warpgroup_step(tokens: int, *, half: bool) -> str:
    """
    Return the device function that adds one step of 16 inputs to 64 outputs x `tokens` sums, or begins them anew.

    The instruction names every register, so that it cannot be written for a number that is a parameter.
    """
    count = tokens // 2
    registers = ", ".join(f"%{number}" for number in range(count))
    operands = ", ".join(f'"+f"(d[{number}])' for number in range(count))
    kind = "f16" if half else "bf16"
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind}"
    a = ", ".join(f"%{count + number}" for number in range(4))
    return f"""
__device__ __forceinline__ void multiply_step(float (&d)[{count}], const unsigned (&a)[4], unsigned long long x,
                                              int add) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
                 "{instruction} {{{registers}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;\\n}}"
                 : {operands}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add));
}}"""


def _float8_step(columns: int) -> str:
    """Return the same for 32 inputs out of float8_e4m3fn in shared memory: 64 rows of x times `columns` outputs."""
    count = columns // 2
    registers = ", ".join(f"%{number}" for number in range(count))
    operands = ", ".join(f'"+f"(d[{number}])' for number in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3"
    return f"""
__device__ __forceinline__ void multiply_step(float (&d)[{count}], unsigned long long x, unsigned long long codes,
                                              int add) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
                 "{instruction} {{{registers}}}, %{count}, %{count + 1}, p, 1, 1;\\n}}"
                 : {operands}
                 : "l"(x), "l"(codes), "r"(add));
}}"""
