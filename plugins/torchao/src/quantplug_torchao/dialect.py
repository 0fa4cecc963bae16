"""
torchao's spelling of a configuration, as Transformers stores it: one configuration for all linear layers, or one for
each of some modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import path_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_bool, get_mapping
from quantplug.names import GENERIC
from quantplug.patterns import vet
from quantplug.skip import Entry, EntryKind, Rule
from quantplug_torchao.forms import read_form
from quantplug_torchao.nodes import read_node, refused

if TYPE_CHECKING:
    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.skip import SchemeRef
    from quantplug_torchao.nodes import Node

_EMBEDDINGS = ("include_input_output_embeddings", "include_embedding")
_KNOWN = frozenset({
    "quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert", "untie_embedding_weights",
    *_EMBEDDINGS,
})  # fmt: skip
_MIXED = ("FqnToConfig", "ModuleFqnToConfig")
"""Classes of configurations that name others, by module."""
_LISTS = ("fqn_to_config", "module_fqn_to_config")
_REST = "_default"
_REGEX = "re:"
_WEIGHTS = (r"\.weight", ".weight")


class TorchaoDialect(Dialect):
    """Reads torchao configurations."""

    name = "torchao"
    methods = ("torchao",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: modules that stay whole first, then single names, then expressions.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        notes = [
            f"{raw.origin(key)} is not known to this reader and left out of account"
            for key in raw.fields
            if key not in _KNOWN
        ]
        for key in _EMBEDDINGS:
            if get_bool(raw.fields, key, raw.origin(key), default=False):
                raise refused(raw.origin(key), "embeddings are quantized, too", "linear layers only")
        root = read_node(_outermost(raw), f"{raw.origin('quant_type')}.default")
        rules = _whole(raw)
        if root.kind in _MIXED:
            default, more = _by_module(root, notes)
            rules += more
        else:
            default, note = read_form(root)
            notes += [note] if note else []
        return QuantConfig(
            self.name,
            default,
            tuple(rules),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
            tuple(dict.fromkeys(notes)),
        )


def _outermost(raw: RawConfig) -> Json:
    """Return the configuration itself: Transformers wraps it into an object with the one key "default"."""
    origin, value = raw.origin("quant_type"), raw.fields.get("quant_type")
    if isinstance(value, str):
        raise refused(
            origin,
            f"is {describe_json(value)}: a name whose tensors depend on the version that wrote them",
            "the configuration as an object, as Transformers writes it since version 5",
        )
    if raw.fields.get("quant_type_kwargs"):
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            raw.origin("quant_type_kwargs"),
            "has arguments beside a configuration that has its own",
            expected="none",
        )
    fields = get_mapping(raw.fields, "quant_type", origin)
    if fields.keys() != {"default"}:
        raise ConfigError(
            "QP-CFG-FIELD", origin, f"has the keys {sorted(fields)!s:.120}", expected="the one key 'default'"
        )
    return fields["default"]


def _whole(raw: RawConfig) -> list[Rule]:
    """Return the rules of modules that stay whole; without a list, those are the output heads."""
    listed = raw.fields.get("modules_to_not_convert")
    if listed is not None:
        return [Rule(entry) for entry in path_entries(listed, raw.origin("modules_to_not_convert"))]
    # Layers may have an `output` of their own, so that only the model's counts.
    heads = ((name, EntryKind.EXACT if name == "output" else EntryKind.SUFFIX) for name in GENERIC.heads)
    return [Rule(Entry(name, kind, name, raw.where, implied=True)) for name, kind in heads]


def _by_module(root: Node, notes: list[str]) -> tuple[SchemeRef | None, list[Rule]]:
    """
    Return the scheme of the remaining linear layers and the rules of the others.

    Names of parameters count before names of modules, those before expressions; of these the first in the file counts.
    """
    where = root.where
    root.check_known(_LISTS)
    given = {key: get_mapping(root.fields, key, where) for key in _LISTS if root.fields.get(key)}
    if not given:
        raise ConfigError("QP-CFG-FIELD", where, "names no module", expected=f"an object in {_LISTS[0]}")
    first, *others = given.items()
    if any(other != first[1] for _, other in others):
        raise ConfigError(
            "QP-CFG-CONTRADICTION", f"{where}.{_LISTS[1]}", f"differs from {_LISTS[0]}", expected="the same in both"
        )
    default: SchemeRef | None = None
    ranked: list[tuple[int, Rule]] = []
    for key, value in first[1].items():
        place = f"{where}.{first[0]}[{key!r}]"
        use = None
        if value is not None:
            use, note = read_form(read_node(value, place))
            notes += [note] if note else []
        if key == _REST:
            default = use
        else:
            ranked.append(_rule(key, use, place))
    if len({rule.use for _, rule in ranked if rule.entry.kind is EntryKind.REGEX}) > 1:
        notes.append(f"{where}: Transformers sorts the expressions, so that the first that matches may be another one")
    return default, [rule for _, rule in sorted(ranked, key=lambda pair: pair[0])]


def _rule(key: str, use: SchemeRef | None, where: str) -> tuple[int, Rule]:
    """
    Return the rank of a key and its rule.

    Raises:
        ConfigError: `QP-SKIP-PATTERN`; `QP-CFG-REFUSED` for an embedding.
    """
    if key.startswith(_REGEX):
        pattern = key.removeprefix(_REGEX)
        pattern = pattern.removesuffix(next((ending for ending in _WEIGHTS if pattern.endswith(ending)), ""))
        if not pattern.strip():
            raise ConfigError("QP-SKIP-PATTERN", where, "is an expression without text", expected="an expression")
        vet(pattern, where, "fullmatch")
        return 2, Rule(Entry(key, EntryKind.REGEX, pattern, where, "fullmatch"), use)
    path = key.removesuffix(_WEIGHTS[1])
    if not path:
        raise ConfigError("QP-SKIP-PATTERN", where, "names no module", expected="the path of a module")
    if use is not None and path.rpartition(".")[2] in GENERIC.embeddings:
        raise refused(where, f"{path} is an embedding", "linear layers only")
    return int(path == key), Rule(Entry(key, EntryKind.EXACT, path, where), use)
