"""
Dialects that exist for tests of config resolution only, and checkpoints' configuration files.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from quantplug.config import Dialect, Field, QuantConfig, RawConfig
from quantplug.hooks import hookimpl
from quantplug.plugins import build_registry
from quantplug.registry import Registry
from quantplug.skip import SchemeRef


class Recorder(Dialect):
    """Hands everything it was given over as fields."""

    def __init__(self, name: str, methods: tuple[str, ...], files: tuple[str, ...] = ()) -> None:
        self.name, self.methods, self.files = name, methods, files  # type: ignore[misc]
        self.seen: list[RawConfig] = []

    def parse(self, raw: RawConfig) -> QuantConfig:
        self.seen.append(raw)
        fields = tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items())
        return QuantConfig("", SchemeRef(self.name), fields=fields, notes=("from the dialect",))


class Raiser(Recorder):
    """Raises, or answers, what it was made with."""

    def __init__(self, name: str, answer: object) -> None:
        super().__init__(name, (name,))
        self.answer = answer

    def parse(self, raw: RawConfig) -> QuantConfig:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def registry_of(*dialects: Dialect) -> Registry:
    """Return a registry with one plugin per dialect, named after it."""
    return build_registry(
        {
            f"plug-{dialect.name}": SimpleNamespace(quantplug_dialects=hookimpl(lambda dialect=dialect: [dialect]))
            for dialect in dialects
        }
    )


def write_files(directory: Path, /, **files: object) -> Path:
    """Write files whose names have `_json` for `.json`: objects as JSON, bytes as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name.replace("_json", ".json")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return directory
