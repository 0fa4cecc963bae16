"""
Where other engines would decide otherwise than is stored here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import PluginError
from quantplug.findings import Finding
from quantplug.isolation import Fault, isolated
from quantplug.lintrules import SHOWN, fused_layers
from quantplug.sections import METHOD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantplug.config import QuantConfig
    from quantplug.lintrules import Decided
    from quantplug.peers import PeerReader
    from quantplug.registry import Provided, Registry

_WORDS = {"quantized": "take for quantized", "dense": "leave whole", "error": "refuse, because its shards differ,"}


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison came to, and the (name, release) of the engines that were compared with."""

    findings: tuple[Finding, ...]
    peers: tuple[tuple[str, str], ...]


def compare_peers(decided: Sequence[Decided], config: QuantConfig, registry: Registry) -> Compared:
    """
    Compare what each installed reader of another engine says about every linear layer with what is stored.

    The output head is left out, since engines treat it by its class, whatever the configuration says.

    Raises:
        PluginError: `QP-PLUG-CALL` when a reader fails.
    """
    findings: list[Finding] = []
    peers: list[tuple[str, str]] = []
    if not config.dialect:
        return Compared((), ())
    for provided in registry.peers.values():
        answers = _answers(provided, decided, config)
        if answers is None:
            continue
        peers.append((provided.item.name, provided.item.version))
        findings += _differences(provided.item, answers)
    return Compared(tuple(findings), tuple(peers))


def _answers(
    provided: Provided[PeerReader], decided: Sequence[Decided], config: QuantConfig
) -> list[tuple[str, Decided, object]] | None:
    """Return (path as that engine has it, module, answer) for every layer; None when it does not know the method."""

    def ask() -> list[tuple[str, Decided, object]] | None:
        reader = provided.item
        rules = reader.reading(str(config.section.get(METHOD, "")).lower(), config.section)
        if rules is None:
            return None
        return [(path, item, rules(path, item.module.class_name)) for path, item in _as_run(reader, decided)]

    answers = isolated(ask)
    if isinstance(answers, Fault):
        raise PluginError(
            "QP-PLUG-CALL",
            f"peer {provided.item.name} of {provided.plugin}",
            f"failed to read the configuration: {answers.error}",
            fix="Report this to the makers of the plugin.",
        )
    return answers


def _as_run(reader: PeerReader, decided: Sequence[Decided]) -> Iterator[tuple[str, Decided]]:
    """Yield the linear layers under the paths that the engine runs them by."""
    names: dict[str, str] = {}
    if reader.fuses:
        names = {part.module.path: fused for fused, parts in fused_layers(decided).items() for part in parts}
    for item in decided:
        if item.module.kind == "linear" and not item.module.head and not item.module.tied_to and item.layer is not None:
            yield names.get(item.module.path, item.module.name), item


def _differences(reader: PeerReader, answers: Sequence[tuple[str, Decided, object]]) -> Iterator[Finding]:
    groups: dict[tuple[object, bool, str], list[str]] = {}
    for path, item, answer in answers:
        quantized = item.layer is not None and item.layer.quantized
        if answer is None or answer == ("quantized" if quantized else "dense"):
            continue
        origin = item.entry.origin if item.entry is not None else "default"
        names = groups.setdefault((answer, quantized, origin), [])
        if path not in names[-1:]:
            names.append(path)
    for (answer, quantized, origin), names in groups.items():
        yield Finding(
            "QP-LINT-PEER",
            "warning",
            origin,
            f"{reader.name} {reader.version} would {_WORDS[str(answer)]} {len(names)} layer(s) "
            f"that are stored {'quantized' if quantized else 'dense'}",
            "Spell the entries so that every engine reads them alike: full paths, one for each shard.",
            tuple(names[:SHOWN]),
            len(names),
        )
