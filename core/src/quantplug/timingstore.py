"""
The file in the user's cache directory that keeps measured times.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError, PlanError
from quantplug.jsonio import read_json
from quantplug.timings import Measurement, Timings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.jsonio import Json

VARIABLE = "QUANTPLUG_TIMINGS"
"""Environment variable: the file to use, or "off" to use none."""

VERSION = 1
"""Version of the file's form; another version is ignored."""

_NAME = "timings.json"
_LOCK_SECONDS = 60.0
_FIELDS = frozenset(field.name for field in fields(Measurement))


def store_path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file: what `QUANTPLUG_TIMINGS` names, or one in the user's cache directory; None when it is off."""
    named = environ.get(VARIABLE, "")
    if named == "off":
        return None
    if named:
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("quantplug", appauthor=False) / _NAME


def read_timings(path: Path | None) -> Timings:
    """
    Return what is in the file.

    Never raises: a file that is missing has nothing in it, and one that cannot be read has nothing but a warning.
    """
    if path is None or not path.exists():
        return Timings()
    try:
        return Timings(_parse(read_json(path), str(path)))
    except ConfigError as error:
        return Timings(
            warning=f"the measured times are ignored: {error.where}: {error.what}"
            + (f"; expected {error.expected}" if error.expected else "")
            + ". `quantplug tune` writes them anew"
        )


def add_timings(path: Path, measurements: Sequence[Measurement]) -> Timings:
    """
    Add measurements to the file, each in place of an earlier one of its key, and return all that it then has.

    Processes that do so at once wait for each other; who reads sees the file before or after, never in between. What
    cannot be read is replaced, and the result has the warning about it.

    Raises:
        PlanError: `QP-PLAN-TIMINGS` when the file cannot be written, or another process holds it for a minute.
    """
    from filelock import FileLock, Timeout

    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock"), timeout=_LOCK_SECONDS):
            before = read_timings(path)
            merged = Timings((*before.measurements, *measurements), before.warning)
            body = {"version": VERSION, "measurements": [_to_json(m) for m in merged.measurements]}
            fresh.write_text(json.dumps(body, indent=1), encoding="utf-8")
            fresh.replace(path)
    except (OSError, Timeout) as error:
        with suppress(OSError):
            fresh.unlink()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PlanError(
            "QP-PLAN-TIMINGS",
            str(path),
            f"measured times cannot be stored ({reason})",
            expected="a file that can be written",
            fix=f"Name another one in {VARIABLE}.",
        ) from error
    return merged


def _to_json(measurement: Measurement) -> dict[str, Json]:
    return {
        "device": measurement.device,
        "platform": measurement.platform,
        "problem": json.loads(measurement.problem),
        "kernel": measurement.kernel,
        "versions": dict(measurement.versions),
        "us": [[rows, round(us, 3)] for rows, us in measurement.us],
        "wrong": measurement.wrong,
    }


def _parse(value: Json, where: str) -> list[Measurement]:
    listed = value.get("measurements") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(listed, list):
        raise ConfigError("QP-CFG-FIELD", where, "no measurements", expected="an object with a list of them")
    version = value.get("version")
    if type(version) is not int or version != VERSION:
        raise ConfigError("QP-CFG-FIELD", f"{where}: version", repr(version)[:40], expected=str(VERSION))
    return [_measurement(item, f"{where}: measurements[{n}]") for n, item in enumerate(listed)]


def _measurement(item: Json, where: str) -> Measurement:
    if not isinstance(item, dict) or item.keys() != _FIELDS:
        raise ConfigError(
            "QP-CFG-FIELD", where, "not a measurement", expected=f"the fields {', '.join(sorted(_FIELDS))}"
        )
    versions, problem, us = item["versions"], item["problem"], item["us"]
    texts = {name: item[name] for name in ("device", "platform", "kernel", "wrong")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ConfigError("QP-CFG-FIELD", f"{where}.{name}", repr(text)[:40], expected="a text")
    if not isinstance(problem, dict):
        raise ConfigError("QP-CFG-FIELD", f"{where}.problem", repr(problem)[:40], expected="an object")
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise ConfigError("QP-CFG-FIELD", f"{where}.versions", repr(versions)[:40], expected="names and versions")
    return Measurement(
        device=str(texts["device"]),
        platform=str(texts["platform"]),
        problem=json.dumps(problem, sort_keys=True, separators=(",", ":")),
        kernel=str(texts["kernel"]),
        versions=tuple(sorted((name, str(version)) for name, version in versions.items())),
        us=_points(us, f"{where}.us", wrong=bool(texts["wrong"])),
        wrong=str(texts["wrong"]),
    )


def _points(us: Json, where: str, *, wrong: bool) -> tuple[tuple[int, float], ...]:
    points: list[tuple[int, float]] = []
    for point in us if isinstance(us, list) else ():
        match point:
            case [int(rows), int(time) | float(time)] if type(rows) is int and rows > 0 and time > 0:
                points.append((rows, float(time)))
            case _:
                raise ConfigError("QP-CFG-FIELD", where, repr(point)[:40], expected="[rows, microseconds], above 0")
    rising = [rows for rows, _ in points]
    if rising != sorted(set(rising)) or (not points and not wrong):
        raise ConfigError("QP-CFG-FIELD", where, repr(us)[:40], expected="[rows, microseconds] by rising rows")
    return tuple(points)
