"""
Which rows take which experts, in every way that goes wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from quantplug_testkit.canonical import to_float64
from quantplug_testkit.oracles.experts import locate

if TYPE_CHECKING:
    from quantplug_testkit.conformance.experts.hazard import ExpertHazard
    from quantplug_testkit.oracles.canonical import Floats, Integers

Kind = Literal["mixed", "one-expert", "idle-ends", "repeated", "nowhere", "spread"]

_ABSENT = 3


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """
    What a router says about M rows.

    Attributes:
        weights: float32 `[M, T]`, of either sign, adding up to nothing in particular.
        ids: int64 or int32 `[M, T]`.
        expert_map: the local number of each of all experts, or -1; None where ids are local numbers.
    """

    weights: torch.Tensor
    ids: torch.Tensor
    expert_map: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Routing:
        """Return the same on a device."""
        mapped = None if self.expert_map is None else self.expert_map.to(device)
        return Routing(self.weights.to(device), self.ids.to(device), mapped)

    def with_ids(self, dtype: torch.dtype) -> Routing:
        """Return the same with ids, and a map, of another integer type."""
        mapped = None if self.expert_map is None else self.expert_map.to(dtype)
        return replace(self, ids=self.ids.to(dtype), expert_map=mapped)

    def factors(self) -> Floats:
        """Return the weights in float64."""
        return to_float64(self.weights)

    def chosen(self, experts: int) -> Integers:
        """Return the local number of each expert, or -1 for none."""
        mapped = None if self.expert_map is None else self.expert_map.cpu().to(torch.int64).numpy()
        found = locate(self.ids.cpu().to(torch.int64).numpy(), mapped)
        return np.where((found >= 0) & (found < experts), found, -1)


def route(hazard: ExpertHazard, rows: int, kind: Kind = "mixed", seed: int = 0) -> Routing:
    """
    Return a routing of a number of rows, the same for the same hazard and seed on every machine.

    Args:
        hazard: the layer.
        rows: M.
        kind: "spread" is what a router does: T different experts for each row. "mixed" is that with every fifth slot
            padded, an expert named twice in a row, and rows without any. "one-expert" sends every row to the last
            expert, once, and pads the rest. "idle-ends" leaves the first and the last without rows. "repeated" names
            one expert T times. "nowhere" is padding alone.
        seed: another one for the same kind.
    """
    experts, top_k = hazard.problem.experts, hazard.problem.top_k
    generator = hazard.generator(seed, 2_000_000, rows)
    weights = generator.uniform(0.2, 1.5, (rows, top_k)) * generator.choice([-1.0, 1.0], (rows, top_k))
    ids = np.argsort(generator.random((rows, experts)), axis=1)[:, :top_k]
    padding = generator.choice([-1, experts, experts + 1, 2**31 - 1, -(2**31)], (rows, top_k))
    match kind:
        case "spread":
            pass
        case "mixed":
            ids = np.where(generator.random((rows, top_k)) < 0.2, padding, ids)
            ids[2::7] = padding[2::7]
            ids[4::7] = ids[4::7, :1]
        case "one-expert":
            ids = np.where(np.arange(top_k) == rows % top_k, experts - 1, padding)
        case "idle-ends":
            ids = np.where((ids == 0) | (ids == experts - 1), padding, ids)
        case "repeated":
            ids = np.repeat(ids[:, :1], top_k, axis=1)
        case "nowhere":
            ids = padding
    return Routing(torch.from_numpy(weights).float(), torch.from_numpy(ids.astype(np.int64)))


def scatter(hazard: ExpertHazard, routing: Routing, seed: int = 0) -> Routing:
    """
    Return a routing in the numbers of a larger layer, of which the hazard's experts are some, with the map to theirs.

    Experts that are not here get rows, too: what was padding beyond E may name one of them.
    """
    experts = hazard.problem.experts
    order = hazard.generator(seed, 3_000_000).permutation(experts + _ABSENT)
    here = np.argsort(order)[:experts]
    mapped = torch.from_numpy(np.where(order < experts, order, -1))
    ids = routing.ids.clone()
    known = (ids >= 0) & (ids < experts)
    ids[known] = torch.from_numpy(here)[ids[known]]
    absent = torch.from_numpy(np.flatnonzero(order >= experts))
    ids[~known & (ids == experts + 1)] = absent[0]
    return Routing(routing.weights, ids, mapped)
