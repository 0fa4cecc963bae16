"""
The first phase: every contender prepares every layer, compiles what it needs and is held against a float32 product.

Several processes do this at once; nothing is timed. What takes long to prepare is left in a folder for the second
phase.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.cases import FORMATS, Case
from benchmarks.gpu.contenders import Contender, Held, Ours
from benchmarks.gpu.peers import PEERS
from quantplug.spec import PerBlock

LARGEST_ERROR = 1e-2
"""Of the norm of the difference, over that of the product: far above what is right; the tests are the strict ones."""

_COMPARED = 32
"""Rows at both ends that are compared."""


@dataclass(slots=True)
class Checked:
    """
    What became of one contender on one layer.

    Attributes:
        name: the contender's.
        case: the layer.
        refused: why it does not run it, or what went wrong; "" when it does.
        errors: by number of rows, relative to the norm of the product.
    """

    name: str
    case: Case
    refused: str = ""
    errors: dict[int, float] = field(default_factory=dict)


def make(name: str) -> Contender:
    """Return a contender by name."""
    for maker in PEERS:
        peer = maker()
        if peer.name == name:
            return peer
    return Ours(name)


def check_all(tasks: list[tuple[str, Case]], rows: tuple[int, ...], folder: Path) -> list[Checked]:
    """Check contenders, by name, on layers; the largest layers first, in as many processes as there are processors."""
    tasks = sorted(tasks, key=lambda task: -task[1].n * task[1].k)
    workers = max(1, min(len(tasks), (os.cpu_count() or 4) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        return list(pool.map(_check, tasks, [rows] * len(tasks), [folder] * len(tasks)))


def load(contender: Contender, case: Case, folder: Path) -> Held:
    """Return what a contender holds of a layer, from the folder where it takes long to make."""
    if contender.quick_to_prepare:
        return contender.prepare(case)
    tensors, facts = torch.load(_place(folder, contender.name, case), weights_only=True)
    return Held({name: tensor.to("cuda") for name, tensor in tensors.items()}, facts)


def _begin() -> None:
    torch.set_num_threads(2)


def _check(task: tuple[str, Case], rows: tuple[int, ...], folder: Path) -> Checked:
    name, case = task
    result = Checked(name, case)
    try:
        contender = make(name)
        result.refused = contender.refuses(case)
        if not result.refused:
            held = contender.prepare(case)
            _compare(contender, held, case, rows, result)
            if not contender.quick_to_prepare:
                tensors = {key: tensor.cpu() for key, tensor in held.tensors.items()}
                torch.save((tensors, held.facts), _place(folder, name, case))
    except Exception as error:  # noqa: BLE001  # a contender that breaks must not take the others with it
        result.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        traceback.print_exc()
    torch.cuda.empty_cache()
    return result


def _compare(contender: Contender, held: Held, case: Case, rows: tuple[int, ...], result: Checked) -> None:
    device = torch.device("cuda")
    values = case.weight(device).dequantize(torch.float32)
    for count in contender.rows(rows, case):
        x = case.inputs(count, device)
        y = contender.call(contender.ready(x, case), held, case)
        some = sorted({*range(min(count, _COMPARED)), *range(max(0, count - _COMPARED), count)})
        right = as_permitted(x, case) if contender.quantizes_x(case) else x.to(torch.float32)
        wanted = right[some] @ values.t()
        error = float((y[some].to(torch.float32) - wanted).norm() / wanted.norm())
        result.errors[count] = error
        if not error < LARGEST_ERROR:
            result.refused = f"wrong for {count} rows: relative error {error:.2g}"
            return


def as_permitted(x: torch.Tensor, case: Case) -> torch.Tensor:
    """Return float32 x `[M, K]` as it is when it is quantized as the format permits."""
    exact, permission = x.to(torch.float32), FORMATS[case.format].activation
    if permission == "none":
        return exact
    params = case.activation()
    if isinstance(FORMATS[case.format].weight.granularity, PerBlock):
        exact = exact.view(x.shape[0], -1, 128)
    if params is not None and params.scale is not None:
        scale = params.scale.to(x.device)
    else:
        scale = exact.abs().amax(-1, keepdim=True) / 448
    codes = (exact / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.to(torch.float32) * scale).view(x.shape)


def _place(folder: Path, name: str, case: Case) -> Path:
    return folder / f"{name}-{case.format}-{case.n}-{case.k}.pt".replace(" ", "_")
