"""
From the files of a checkpoint and the caller's wish to one `QuantConfig`, every field with where it came from.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from quantplug.errors import ConfigError, PluginError, QuantplugError, list_names
from quantplug.isolation import Fault, isolated
from quantplug.jsonio import describe_json
from quantplug.sections import (
    CALLER,
    CONFIG_FILE,
    METHOD,
    Merged,
    add_override,
    code_notes,
    find_sections,
    merge,
    read_object,
    unread_neighbours,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from quantplug.jsonio import Json
    from quantplug.onload import OnLoad
    from quantplug.registry import Provided, Registry
    from quantplug.sections import Section
    from quantplug.skip import Rule, SchemeRef
    from quantplug.spec import ActivationSpec

_METHOD_GRAMMAR = re.compile(r"[a-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class RawConfig:
    """
    What was found in the files, before a dialect reads it.

    Attributes:
        method: the normalised `quant_method`.
        fields: the quantization section, caller's additions merged in.
        origins: where each key of `fields` came from ("config.json: quantization_config.bits", "caller").
        model: the whole of config.json, for `model_type`, `tie_word_embeddings`, `dtype`.
        where: the section as a whole ("config.json: quantization_config"), for messages about several keys.
    """

    method: str
    fields: Mapping[str, Json]
    origins: Mapping[str, str]
    model: Mapping[str, Json]
    where: str = CONFIG_FILE

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
        section: the whole description as the files and the caller spell it, to be written beside saved weights.
        kv_cache: how the cache of keys and values is to be quantized, handed on to the framework.
        on_load: whether the stored weights are dense and quantized while they are loaded.
    """

    dialect: str
    default: SchemeRef | None
    rules: tuple[Rule, ...] = ()
    fields: tuple[Field, ...] = ()
    notes: tuple[str, ...] = ()
    section: Mapping[str, Json] = field(default_factory=dict, compare=False)
    kv_cache: ActivationSpec | None = None
    on_load: bool = False


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

    writes: ClassVar[frozenset[str]] = frozenset()
    """Names of the schemes whose checkpoints it can describe in its own spelling."""

    @abstractmethod
    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the found fields into rules and scheme references.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-SKIP-PATTERN`.

        """

    def write(self, base: SchemeRef, layers: Mapping[str, SchemeRef], dense: Collection[str]) -> dict[str, Json]:
        """
        Return the quantization section that describes a converted checkpoint; `parse` reads the same back from it.

        Args:
            base: scheme of most layers.
            layers: checkpoint path of every quantized layer -> its scheme.
            dense: checkpoint paths of linear layers that stayed whole.
        """
        raise NotImplementedError(f"dialect {self.name} only reads")


def read_model_config(directory: str | Path) -> dict[str, Json]:
    """Return config.json of a checkpoint; raises `ConfigError` (`QP-CFG-…`) when it is missing or not an object."""
    return read_object(Path(directory) / CONFIG_FILE)


def resolve_config(
    directory: str | Path,
    registry: Registry,
    *,
    override: Mapping[str, Json] | None = None,
    quantize: OnLoad | None = None,
) -> QuantConfig:
    """
    Find out how a checkpoint is quantized.

    The places, the first found leads: `quantization_config` in config.json; `compression_config`; files that an
    installed dialect owns; `text_config.quantization_config`. Where several speak, they must agree. Without any, the
    checkpoint is dense.

    Args:
        directory: of the checkpoint.
        registry: whose dialects are asked.
        override: fields the caller states; they may add to what the files say and confirm it, never contradict it.
        quantize: the wish to quantize dense weights while they are loaded; about a checkpoint that is quantized, it may
            only confirm what the files say.

    The same function serves a model and its draft: each is resolved from the directory that its tensors lie in.

    Raises:
        ConfigError: `QP-CFG-METHOD` when nobody reads the method, `QP-CFG-CONTRADICTION`, `QP-CFG-OVERRIDE`, and what
            reading the files or the dialect raises.
        PluginError: `QP-PLUG-CONFLICT` when two plugins claim the method, `QP-PLUG-CALL` when the dialect fails.
    """
    directory = Path(directory)
    model = read_model_config(directory)
    owners: dict[str, tuple[str, ...]] = {}
    for name in sorted(registry.dialects):
        for file in registry.dialects[name].item.files:
            owners[file] = (*owners.get(file, ()), name)
    sections = find_sections(directory, model, owners)
    unread = unread_neighbours(directory, owners)
    if not sections:
        return _dense(directory, model, unread, registry, override or {}, quantize)
    method, origin, notes = _method(sections, registry, override or {})
    provided = _dialect(method, origin, registry)
    merged = merge(sections, provided.item.name)
    merged.fields.setdefault(METHOD, method)
    merged.origins.setdefault(METHOD, origin)
    add_override(merged, override or {})
    notes += [*code_notes(model, merged), *merged.notes]
    notes += [f"{name} lies beside; no installed plugin reads it" for name in unread]
    raw = RawConfig(method, merged.fields, merged.origins, model, sections[0].place)
    config = _parse(provided, raw, notes)
    if quantize is not None:
        from quantplug.onload import confirm

        confirm(quantize, config, registry)
    return config


def _dense(
    directory: Path,
    model: Mapping[str, Json],
    unread: Sequence[str],
    registry: Registry,
    override: Mapping[str, Json],
    quantize: OnLoad | None,
) -> QuantConfig:
    from quantplug.onload import on_load_config, suggested_grid

    if override:
        raise ConfigError(
            "QP-CFG-OVERRIDE",
            CALLER,
            f"{', '.join(sorted(override))} given for a checkpoint whose {CONFIG_FILE} names no quantization",
            expected="no override: the weights are dense",
            fix="To quantize them while loading, name a grid (quantize='int4-g64'); quantplug convert writes them so.",
        )
    if unread:
        raise ConfigError(
            "QP-CFG-METHOD",
            str(directory / unread[0]),
            f"describes a quantization that {CONFIG_FILE} does not, and no installed plugin reads it",
            expected=f"a plugin that does, or dense weights without {', '.join(unread)}",
            fix="Install the plugin for that format, or move the file away if the weights are dense."
            + "".join(f" Note that {failure}." for failure in registry.failures),
        )
    notes = tuple(code_notes(model, Merged()))
    if quantize is not None:
        return replace(on_load_config(quantize, directory, registry), notes=notes)
    return replace(DENSE, notes=(*notes, *suggested_grid(directory, model, registry)))


def _method(
    sections: Sequence[Section], registry: Registry, override: Mapping[str, Json]
) -> tuple[str, str, list[str]]:
    """Return the method, normalised, where it stands, and what to note about its spelling."""
    for section in sections:
        if METHOD in section.fields:
            return _spelled(section.fields[METHOD], section.origin(METHOD), registry)
    if METHOD in override:
        return _spelled(override[METHOD], CALLER, registry)
    for section in sections:
        if len(section.owners) == 1:
            owner = registry.dialects[section.owners[0]].item
            return owner.methods[0], f"{section.file}: read by {owner.name} only", []
    raise ConfigError(
        "QP-CFG-METHOD",
        sections[0].place,
        f"has no {METHOD}, only {list_names(sections[0].fields)}",
        expected=f"{METHOD}: one of {', '.join(_methods(registry)) or '(no dialect is installed)'}",
        fix=f"If you know the format, state it: override={{'{METHOD}': ...}}.",
    )


def _spelled(value: Json, origin: str, registry: Registry) -> tuple[str, str, list[str]]:
    method = value.lower() if isinstance(value, str) else ""
    # What an installed dialect lists is a name, even where a writer put its repository there ("intel/auto-round").
    if _METHOD_GRAMMAR.fullmatch(method) is None and method not in _methods(registry):
        raise ConfigError(
            "QP-CFG-METHOD",
            origin,
            f"{METHOD} is {describe_json(value)}",
            expected="1 to 64 letters, digits, '_', '.' or '-'; a checkpoint names a method, never a path or code",
        )
    return method, origin, [] if method == value else [f"{origin} is {value!r}, read as {method!r}"]


def _methods(registry: Registry) -> list[str]:
    return sorted({method for provided in registry.dialects.values() for method in provided.item.methods})


def _dialect(method: str, origin: str, registry: Registry) -> Provided[Dialect]:
    try:
        return registry.dialect_for(method)
    except PluginError as error:
        if error.code != "QP-PLUG-MISSING":
            raise
        raise ConfigError(
            "QP-CFG-METHOD",
            origin,
            f"no installed plugin reads {METHOD} {method!r}",
            expected=error.expected,
            fix=error.fix,
        ) from error


def _parse(provided: Provided[Dialect], raw: RawConfig, notes: Sequence[str]) -> QuantConfig:
    dialect = provided.item

    def ask() -> object:
        try:
            return dialect.parse(raw)
        except QuantplugError as error:
            return error

    answer = isolated(ask)
    if isinstance(answer, QuantplugError):
        raise answer
    if not isinstance(answer, QuantConfig):
        what = answer.error if isinstance(answer, Fault) else f"it returned {type(answer).__name__}, not QuantConfig"
        raise PluginError(
            "QP-PLUG-CALL",
            f"dialect {dialect.name} of {provided.plugin}",
            f"failed to read {raw.where}: {what}",
            fix="Report this to the makers of the plugin.",
        )
    fields = answer.fields
    if all(known.name != METHOD for known in fields):
        fields = (Field(METHOD, raw.fields[METHOD], raw.origin(METHOD)), *fields)
    return replace(answer, dialect=dialect.name, fields=fields, notes=(*notes, *answer.notes), section=raw.fields)
