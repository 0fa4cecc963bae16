"""
The second phase: one process, one call after the other, everything about one layer and number of rows close together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import FORMATS, Case
from benchmarks.gpu.checking import Checked, load, make
from benchmarks.gpu.contenders import Contender, Held
from benchmarks.gpu.timing import copies_of, per_call
from quantplug.asking import probe
from quantplug.detect import detect
from quantplug.errors import PlanError
from quantplug.inventory import ModuleInfo
from quantplug.plugins import registry
from quantplug.policy import Policy
from quantplug.select import select

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quantplug.plan import Choice


@dataclass(frozen=True, slots=True)
class Ceilings:
    """
    What the device does at most.

    Attributes:
        read: bytes per second of reading 2 GiB: what torch's sum reaches.
        bf16: products and sums per second of a bfloat16 product of 8192 x 8192 x 8192.
        fp8: the same in FP8 with one scale each and fast accumulation; 0 where there is none.
    """

    read: float
    bf16: float
    fp8: float


@dataclass(slots=True)
class Point:
    """
    All figures about one layer and number of rows.

    Attributes:
        format, n, k, rows: what was measured.
        roof_us: the larger of reading the weight once and of all products at the device's rate.
        chosen: the kernel that a plan takes.
        us: microseconds of a call, by contender.
    """

    format: str
    n: int
    k: int
    rows: int
    roof_us: float
    chosen: str
    us: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)


def ceilings() -> Ceilings:
    """Measure the device."""
    read = _read_bandwidth()
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
    work = 2.0 * size**3
    bf16 = work / (per_call(lambda _: torch.nn.functional.linear(a, b), [0]) * 1e-6)
    fp8 = 0.0
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones(1, device="cuda")
        x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

        def product(_: int) -> torch.Tensor:
            return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        fp8 = work / (per_call(product, [0]) * 1e-6)
    return Ceilings(read, bf16, fp8)


def _read_bandwidth() -> float:
    ones = torch.ones(1 << 29, device="cuda")
    return ones.nbytes / (per_call(lambda _: ones.sum(), [0]) * 1e-6)


def measure(checked: list[Checked], rows: tuple[int, ...], limits: Ceilings, folder: Path) -> Iterator[Point]:
    """Yield a point for each layer and number of rows, in the order of layers."""
    for case in dict.fromkeys(result.case for result in checked):
        choices = _choices(case)
        running = [(make(r.name), r) for r in checked if r.case == case and not r.refused]
        turns = {contender.name: _turns(contender, case, folder) for contender, _ in running}
        for count in rows:
            point = Point(case.format, case.n, case.k, count, _roof(case, count, limits), _chosen(choices, count))
            x = case.inputs(count, torch.device("cuda"))
            for contender, result in running:
                if count in result.errors:
                    point.us[contender.name] = _time(contender, case, x, turns[contender.name])
            yield point
        del turns
        torch.cuda.empty_cache()


def _turns(contender: Contender, case: Case, folder: Path) -> list[Held]:
    held = load(contender, case, folder)
    return [Held(tensors, held.facts) for tensors in copies_of(held.tensors)]


def _time(contender: Contender, case: Case, x: torch.Tensor, turns: list[Held]) -> float:
    ready = contender.ready(x, case)
    return per_call(lambda held: contender.call(ready, held, case), turns)


def _roof(case: Case, rows: int, limits: Ceilings) -> float:
    rate = limits.fp8 if FORMATS[case.format].quantizes_x and limits.fp8 else limits.bf16
    return max(case.bytes / limits.read, 2.0 * rows * case.n * case.k / rate) * 1e6


def _choices(case: Case) -> tuple[Choice, ...]:
    """Return the kernels that a plan takes for a layer, without any measurement or wish."""
    known, platform = registry(), detect()
    probes = {name: probe(provided.item, platform) for name, provided in known.kernels.items()}
    module = ModuleInfo("layer", "linear")
    try:
        return select(case.problem, module, platform, known, Policy(), probes).choices
    except PlanError:
        return ()


def _chosen(choices: tuple[Choice, ...], rows: int) -> str:
    for choice in choices:
        if choice.max_rows is None or rows <= choice.max_rows:
            return choice.kernel
    return ""
