"""
The figures of `quantplug bench` as values: to print, to keep as JSON, to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import get_int, get_mapping, get_str
from quantplug.serial import plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json

VERSION = 1
"""Version of the JSON form."""

DENSE = "F.linear"
"""How torch's own product, with the weight in the dtype of x, is called beside kernels."""


@dataclass(frozen=True, slots=True)
class Point:
    """
    One kernel for one problem and one number of rows.

    Attributes:
        kernel: its name; `DENSE` is the yardstick.
        label: how the problem is called.
        shape: (N, K).
        dtype: torch name of the dtype of x.
        rows: M.
        us: median microseconds of a call.
        bytes_moved: bytes that a call must read and write: what the kernel holds, x and y.
        gbps: those bytes over the time, in GB/s.
        tflops: 2 M N K over the time, in TFLOP/s.
        of_read: the share of the machine's read bandwidth that this is.
        of_flops: the share of what a large dense product reaches in that dtype.
        of_dense: how many times as fast as `DENSE` it is.
    """

    kernel: str
    label: str
    shape: tuple[int, int]
    dtype: str
    rows: int
    us: float
    bytes_moved: int
    gbps: float
    tflops: float
    of_read: float
    of_flops: float
    of_dense: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A kernel that accepted a problem and was wrong, or for which memory did not suffice."""

    kernel: str
    label: str
    shape: tuple[int, int]
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """
    All figures of one run.

    Attributes:
        device: name of the machine.
        platform: the platform in words.
        versions: of what took part.
        read: bytes per second that the machine reads.
        flops: (dtype, operations per second of a large dense product).
        points: in the order they were measured.
        failures: what could not be measured.
        version: of the JSON form.
    """

    device: str
    platform: str
    versions: tuple[tuple[str, str], ...]
    read: float
    flops: tuple[tuple[str, float], ...]
    points: tuple[Point, ...]
    failures: tuple[Failure, ...] = ()
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Change:
    """
    One point in two reports.

    Attributes:
        before: in the first.
        after: in the second.
        times: how many times as fast it became.
    """

    before: Point
    after: Point

    @property
    def times(self) -> float:
        """How many times as fast it became."""
        return self.before.us / self.after.us


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two reports have in common, and what only one of them has."""

    changes: tuple[Change, ...]
    only_before: tuple[Point, ...]
    only_after: tuple[Point, ...]


def compare(before: BenchReport, after: BenchReport) -> Comparison:
    """Return the points of two reports side by side."""
    first, second = ({_identity(point): point for point in report.points} for report in (before, after))
    return Comparison(
        tuple(Change(point, second[key]) for key, point in first.items() if key in second),
        tuple(point for key, point in first.items() if key not in second),
        tuple(point for key, point in second.items() if key not in first),
    )


def _identity(point: Point) -> tuple[object, ...]:
    return point.label, point.shape, point.dtype, point.kernel, point.rows


def report_to_json(report: BenchReport) -> dict[str, Json]:
    """Return a report as plain JSON; `report_from_json` gives an equal one."""
    body = plain(report)
    if not isinstance(body, dict):
        raise TypeError("a report is an object")
    return body | {"versions": dict(report.versions), "flops": dict(report.flops)}


def report_from_json(value: Json, where: str) -> BenchReport:
    """
    Return the report that `report_to_json` wrote.

    Raises:
        ConfigError: `QP-CFG-FIELD` naming the field, when it is not a report of this version.
    """
    if not isinstance(value, dict):
        raise ConfigError("QP-CFG-FIELD", where, "not an object", expected="what `quantplug bench --json` prints")
    get_int(value, "version", where, choices=[VERSION])
    return BenchReport(
        device=get_str(value, "device", where),
        platform=get_str(value, "platform", where),
        versions=tuple((name, str(text)) for name, text in get_mapping(value, "versions", where).items()),
        read=_positive(value, "read", where),
        flops=tuple((dtype, _positive(value["flops"], dtype, where)) for dtype in get_mapping(value, "flops", where)),  # type: ignore[arg-type]  # an object: get_mapping says so
        points=tuple(_point(item, place) for item, place in _objects(value, "points", where)),
        failures=tuple(
            Failure(get_str(item, "kernel", place), get_str(item, "label", place), _shape(item, place),
                    get_str(item, "reason", place))
            for item, place in _objects(value, "failures", where)
        ),
    )  # fmt: skip


def _point(item: Mapping[str, Json], where: str) -> Point:
    numbers = ("us", "gbps", "tflops", "of_read", "of_flops", "of_dense")
    return Point(
        kernel=get_str(item, "kernel", where),
        label=get_str(item, "label", where),
        shape=_shape(item, where),
        dtype=get_str(item, "dtype", where),
        rows=get_int(item, "rows", where, minimum=1),
        bytes_moved=get_int(item, "bytes_moved", where, minimum=0),
        **{name: _positive(item, name, where) for name in numbers},
    )


def _objects(value: Mapping[str, Json], key: str, where: str) -> list[tuple[dict[str, Json], str]]:
    listed = value.get(key)
    found = []
    for number, item in enumerate(listed if isinstance(listed, list) else [listed]):
        if not isinstance(item, dict):
            raise ConfigError("QP-CFG-FIELD", f"{where}: {key}[{number}]", repr(item)[:40], expected="an object")
        found.append((item, f"{where}: {key}[{number}]"))
    return found


def _shape(item: Mapping[str, Json], where: str) -> tuple[int, int]:
    match item.get("shape"):
        case [int(n), int(k)] if n > 0 and k > 0:
            return n, k
        case other:
            raise ConfigError("QP-CFG-FIELD", f"{where}.shape", repr(other)[:40], expected="[N, K]")


def _positive(item: Mapping[str, Json], key: str, where: str) -> float:
    number = item.get(key)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
        raise ConfigError("QP-CFG-FIELD", f"{where}.{key}", repr(number)[:40], expected="a number above 0")
    return float(number)
