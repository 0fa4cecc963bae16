"""
The installed distributions that name quantplug plugins, read one by one and without importing anything.

The standard library's `entry_points()` reads all distributions at once, so that one unreadable file of an unrelated
package hides every plugin. Here each distribution stands for itself: directories are listed, `entry_points.txt` is
read, and only where it names our group is anything else looked at.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantplug.errors import PluginError
from quantplug.hooks import GROUP
from quantplug.registry import PluginFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_DIRECTORY = re.compile(r"(?P<name>.+?)(-(?P<version>\d[^-]*)(-.*)?)?\.(dist|egg)-info")
_METADATA = {".dist-info": "METADATA", ".egg-info": "PKG-INFO"}


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """One line of the group: `name = value`, the value as it stands there."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """
    One installed distribution that names plugins.

    Attributes:
        name: normalised ("quantplug-gptq").
        version: as its metadata says.
        entries: its lines in our group, sorted by name.
        location: the directory its metadata directory lies in.

    """

    name: str
    version: str
    entries: tuple[EntryPoint, ...]
    location: str


def normalise(name: str) -> str:
    """Return a distribution's name as the packaging standards compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_distributions(path: Sequence[str]) -> tuple[list[Distribution], list[PluginFailure]]:
    """
    Return the distributions on `path` that name plugins, by name, and what could not be read.

    Of two distributions with one name the first on `path` counts, as it does for an import; where the other one is
    not simply the same again, that is reported. A damaged distribution that does not mention our group is none of our
    business.
    """
    distributions: list[Distribution] = []
    failures: list[PluginFailure] = []
    for _, (first, *others) in sorted(_scan(path).items()):
        distribution = _read(first, failures)
        if distribution is not None:
            distributions.append(distribution)
        failures += [_shadowed(first, other) for other in others if _differs(first, other)]
    return distributions, failures


@dataclass(frozen=True, slots=True)
class _Found:
    """A metadata directory, by its name alone."""

    key: str
    version: str
    directory: Path

    @property
    def location(self) -> str:
        return str(self.directory.parent)

    def entry_points(self) -> bytes:
        """Return the file's bytes if they mention our group, else nothing."""
        try:
            raw = (self.directory / "entry_points.txt").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        # UTF-16 is wrong there, but what it says still shows whether it is about us.
        return raw if GROUP.encode() in raw.replace(b"\0", b"") else b""

    def identity(self) -> tuple[str, str]:
        """Return name and version as the metadata file says; raises `PluginError` when it does not."""
        file = self.directory / _METADATA[self.directory.suffix]
        found = {"name": "", "version": ""}
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    key, colon, value = line.partition(":")
                    if not colon:
                        break
                    if key.lower() in found:
                        found[key.lower()] = value.strip()
        except OSError as error:
            raise _unreadable(file, f"cannot be read: {error.strerror}") from error
        missing = [key for key, value in found.items() if not value]
        if missing:
            raise _unreadable(file, f"has no {' and no '.join(missing)}")
        return normalise(found["name"]), found["version"]


def _unreadable(file: Path, what: str) -> PluginError:
    return PluginError("QP-PLUG-METADATA", str(file), what, fix="Reinstall the distribution")


def _scan(path: Sequence[str]) -> dict[str, list[_Found]]:
    """Return the metadata directories on `path` by normalised name, the one that counts first."""
    result: dict[str, list[_Found]] = {}
    # Python imports from entries that are text only, whatever else a program may have put on the path.
    for directory in dict.fromkeys(os.path.realpath(entry) for entry in path if isinstance(entry, str)):
        here: dict[str, list[_Found]] = {}
        for found in _list(Path(directory)):
            here.setdefault(found.key, []).append(found)
        for key, several in here.items():
            # Two versions in one directory are left by an interrupted upgrade; the code there is the newer one's.
            result.setdefault(key, []).extend(sorted(several, key=_age, reverse=True))
    return result


def _list(directory: Path) -> Iterator[_Found]:
    try:
        with os.scandir(directory) as children:
            names = [child.name for child in children]
    except OSError:
        # Absent, closed to us, or a zip file, into which nobody installs distributions.
        return
    for name in names:
        # pip renames what it is about to remove to "~ame"; such leftovers are nobody's metadata.
        if name.endswith("-info") and not name.startswith("~") and (match := _DIRECTORY.fullmatch(name)):
            yield _Found(normalise(match["name"]), match["version"] or "", directory / name)


def _age(found: _Found) -> tuple[list[int], bool, str]:
    numbers = [int(number) for number in re.findall(r"\d+", found.version)]
    return numbers, found.directory.suffix == ".dist-info", found.directory.name


def _read(found: _Found, failures: list[PluginFailure]) -> Distribution | None:
    """Return what the directory says about plugins, None when that is nothing; append what is wrong with it."""
    name, version = found.key, found.version
    try:
        raw = found.entry_points()
        if not raw:
            return None
        name, version = found.identity()
        entries = _parse(raw, found.directory / "entry_points.txt")
    except PluginError as error:
        failures.append(PluginFailure(name, version, "", "metadata", str(error), location=found.location))
        return None
    except OSError as error:
        # Its content is unknown, so only the name can tell whether it was about us.
        if "quantplug" in name:
            message = str(_unreadable(found.directory / "entry_points.txt", f"cannot be read: {error.strerror}"))
            failures.append(PluginFailure(name, version, "", "metadata", message, location=found.location))
        return None
    times = Counter(entry.name for entry in entries)
    for twice in sorted(entry for entry, count in times.items() if count > 1):
        values = " and ".join(entry.value for entry in entries if entry.name == twice)
        message = str(_unreadable(found.directory / "entry_points.txt", f"names {twice} twice: {values}"))
        failures.append(PluginFailure(name, version, twice, "metadata", message, location=found.location))
    once = sorted((entry for entry in entries if times[entry.name] == 1), key=lambda entry: entry.name)
    return Distribution(name, version, tuple(once), found.location)


def _parse(raw: bytes, file: Path) -> list[EntryPoint]:
    """Return the lines of our group; raises `PluginError` when the file is not UTF-8 or not of the documented form."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(file, f"is not UTF-8 at byte {error.start}") from error
    entries: list[EntryPoint] = []
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not (section and name and equals):
            raise _unreadable(file, f"line {number} is neither [group] nor name = value: {line[:80]!r}")
        if section == GROUP:
            entries.append(EntryPoint(name, value))
    return entries


def _differs(first: _Found, other: _Found) -> bool:
    """Return whether two distributions of one name are about plugins and not the same again."""
    try:
        ours = first.entry_points(), other.entry_points()
        return any(ours) and (ours[0] != ours[1] or _version(first) != _version(other))
    except OSError:
        return False  # reading the first one reports what is unreadable


def _version(found: _Found) -> str:
    try:
        return found.identity()[1]
    except PluginError:
        return found.version


def _shadowed(first: _Found, other: _Found) -> PluginFailure:
    error = PluginError(
        "QP-PLUG-METADATA",
        str(other.directory),
        f"version {_version(other)} is hidden by version {_version(first)} in {first.directory}",
        expected="one installation on the import path",
        fix="Uninstall one of them",
    )
    return PluginFailure(other.key, _version(other), "", "metadata", str(error), location=other.location)
