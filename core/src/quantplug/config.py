"""
From the files of a checkpoint and the caller's wish to one `QuantConfig`, every field with where it came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug.skip import Rule, SchemeRef


@dataclass(frozen=True, slots=True)
class RawConfig:
    """
    What was found in the files, before a dialect reads it.

    Attributes:
        method: the normalised `quant_method`.
        fields: the quantization section, caller's additions merged in.
        origins: where each key of `fields` came from ("config.json: quantization_config.bits", "caller").
        model: the whole of config.json, for `model_type`, `tie_word_embeddings`, `dtype`.

    """

    method: str
    fields: Mapping[str, Json]
    origins: Mapping[str, str]
    model: Mapping[str, Json]

    def origin(self, key: str) -> str:
        """Return where `key` came from, for messages."""
        return self.origins.get(key, f"default ({key} is absent)")


@dataclass(frozen=True, slots=True)
class Field:
    """One resolved field and its provenance, for people."""

    name: str
    value: Json
    origin: str


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """
    The resolved quantization of one checkpoint.

    Attributes:
        dialect: name of the dialect that read it, "" for a dense checkpoint.
        default: the scheme of linear modules that no rule touches, or None (dense, or a positive list).
        rules: ordered; the first match decides.
        fields: what was read and from where.
        notes: what a reader should know.

    """

    dialect: str
    default: SchemeRef | None
    rules: tuple[Rule, ...] = ()
    fields: tuple[Field, ...] = ()
    notes: tuple[str, ...] = ()


DENSE = QuantConfig(dialect="", default=None)
"""A checkpoint without quantization."""


class Dialect(ABC):
    """
    One spelling of quantization in configuration files; a plugin's `quantplug_dialects` returns instances.

    A dialect reads words, never tensors, and names schemes, never code.
    """

    name: ClassVar[str]
    """Unique among installed plugins."""
    methods: ClassVar[tuple[str, ...]]
    """`quant_method` values it answers to, documented aliases included; lower case."""
    files: ClassVar[tuple[str, ...]] = ()
    """Names of further configuration files of its own ("quantize_config.json"), read beside config.json."""

    @abstractmethod
    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the found fields into rules and scheme references.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-SKIP-PATTERN`.

        """
