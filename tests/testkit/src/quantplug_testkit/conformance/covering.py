"""
Few of many hazards, in which every pair of properties occurs that occurs in any.

Most faults of a kernel need one property to show (a type, a size), nearly all others two together (a type in float16, a
ragged group under act-order). Where each form has to be compiled, as for most GPUs, a selection in which every pair
occurs takes a small part of the time of the whole catalogue, and `tests/testkit_meta` shows that no kernel of the zoo
gets through it.
"""

from __future__ import annotations

import os
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from quantplug_testkit.conformance.experts.hazard import ExpertHazard
    from quantplug_testkit.conformance.hazard import Hazard

VARIABLE = "QUANTPLUG_CATALOGUE"
"""Environment variable that asks for the "whole" catalogue or a "covering" selection of it, whatever the device."""

T = TypeVar("T")


def whole_catalogue(device: str) -> bool:
    """Whether kernels on a device are tried on the whole catalogue: as the environment says, else on the CPU only."""
    wish = os.environ.get(VARIABLE, "")
    if wish not in {"", "whole", "covering"}:
        raise pytest.UsageError(f"{VARIABLE} is {wish!r}, and must be whole or covering")
    return wish == "whole" or (not wish and torch.device(device).type == "cpu")


def covering(items: Sequence[T], features: Callable[[T], Iterable[Hashable]]) -> list[T]:
    """
    Return some of the items, in their order, that have between them every feature that any of them has.

    Taken is, again and again, the item that adds most, and of several the first: the same on every machine. That is not
    the smallest selection there is, but within a small factor of it.
    """
    bits: dict[Hashable, int] = {}
    masks = [0] * len(items)
    for place, item in enumerate(items):
        for feature in features(item):
            masks[place] |= 1 << bits.setdefault(feature, len(bits))
    missing, taken = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(items)), key=lambda place: ((masks[place] & missing).bit_count(), -place))
        taken.append(best)
        missing &= ~masks[best]
    return [items[place] for place in sorted(taken)]


def pairs(aspects: Mapping[str, Hashable]) -> list[tuple[tuple[str, Hashable], ...]]:
    """Return each two aspects with their values, as features."""
    return list(combinations(aspects.items(), 2))


def generate(
    metafunc: pytest.Metafunc, arguments: Iterable[tuple[str, ...]], given: Callable[[tuple[str, ...]], Sequence[Any]]
) -> None:
    """
    Give a test the hazards of the first arguments that it takes.

    Args:
        metafunc: the test.
        arguments: names of arguments that go together, those with most first.
        given: for such names, what each test is given: a hazard, and a number of rows where that is the second name.
    """
    for names in arguments:
        if set(names) <= set(metafunc.fixturenames):
            metafunc.parametrize(names, [pytest.param(*values, id=_id(*values)) for values in given(names)])
            return


def _id(hazard: Hazard | ExpertHazard, *rows: int) -> str:
    return "-".join([hazard.name, *(f"{number}-rows" for number in rows)])
