"""
Measured times of kernels, as `quantplug tune` leaves them on a machine and a plan uses them.

A plan that is made for the machine at hand reads them; the kernels it then chooses are part of its hash, the times are
not. The ranks of a job share one file, or one plan: a rank whose machine was measured otherwise may choose otherwise,
which comparing the hashes shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.serial import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.moe import MoEProblem
    from quantplug.moekernel import Kernel
    from quantplug.platform import Platform
    from quantplug.registry import Provided, Registry
    from quantplug.spec import LinearProblem


@dataclass(frozen=True, slots=True)
class Measurement:
    """
    How long one kernel takes for one problem on one machine, by number of rows.

    Attributes:
        device: name of the machine, as `Platform.device` has it.
        platform: the platform in words ("cuda:9.0").
        problem: the problem as JSON text, see `problem_key`.
        kernel: its name.
        versions: (name, version) of everything that has a part in it, see `versions_of`.
        us: (rows M, median microseconds) by rising rows; () when its result was wrong.
        wrong: why its result was refused, "" when it was right.
    """

    device: str
    platform: str
    problem: str
    kernel: str
    versions: tuple[tuple[str, str], ...]
    us: tuple[tuple[int, float], ...]
    wrong: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a later measurement replaces it by."""
        return self.device, self.platform, self.problem, self.kernel

    def at(self, rows: int) -> float:
        """Return the microseconds for M = `rows`, see `time_at`."""
        return time_at(self.us, rows)


class Timings:
    """
    What was measured on this machine and others.

    Args:
        measurements: at most one per key; of several the last counts.
        warning: what went wrong when they were read, "" when nothing did.
    """

    __slots__ = ("_by_key", "warning")

    def __init__(self, measurements: Iterable[Measurement] = (), warning: str = "") -> None:
        self._by_key = {measurement.key: measurement for measurement in measurements}
        self.warning = warning

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """All of them, in the order of their keys."""
        return tuple(self._by_key[key] for key in sorted(self._by_key))

    def of(
        self,
        problem: LinearProblem | MoEProblem,
        platform: Platform,
        kernels: Mapping[str, Provided[Kernel]],
        registry: Registry,
    ) -> dict[str, Measurement]:
        """Return what holds for a problem by kernel name; what other versions were measured with does not."""
        if not platform.device or not self._by_key:
            return {}
        key = problem_key(problem)
        found: dict[str, Measurement] = {}
        for name, provided in kernels.items():
            measurement = self._by_key.get((platform.device, str(platform), key, name))
            if measurement is not None and measurement.versions == versions_of(provided.plugin, platform, registry):
                found[name] = measurement
        return found

    def knows(self, problem: LinearProblem | MoEProblem, platform: Platform) -> bool:
        """Return whether a problem was measured on the platform, with whatever versions."""
        place = platform.device, str(platform), problem_key(problem)
        return any(key[:3] == place for key in self._by_key)


def problem_key(problem: LinearProblem | MoEProblem) -> str:
    """Return a problem as JSON text; equal problems have equal texts, in any process."""
    return json.dumps(to_json(problem), sort_keys=True, separators=(",", ":"))


def versions_of(plugin: str, platform: Platform, registry: Registry) -> tuple[tuple[str, str], ...]:
    """Return (name, version) of what a measurement depends on: the platform's, the core's and the plugin's."""
    from quantplug import __version__

    versions = dict(platform.versions) | {"quantplug-core": __version__}
    versions |= {info.distribution: info.version for info in registry.plugins if info.distribution == plugin}
    return tuple(sorted(versions.items()))


def time_at(us: tuple[tuple[int, float], ...], rows: int) -> float:
    """
    Return the microseconds for M = `rows` from those of measured rows.

    Between two of them it is on the line that joins them; below the first it is that of the first, and beyond the last
    it grows as the rows do.
    """
    below = [point for point in us if point[0] <= rows]
    if not below:
        return us[0][1]
    (low, low_us), above = below[-1], us[len(below) :]
    if not above:
        return low_us * max(1.0, rows / low)
    high, high_us = above[0]
    return low_us + (high_us - low_us) * (rows - low) / (high - low)
