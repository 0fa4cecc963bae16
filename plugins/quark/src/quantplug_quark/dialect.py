"""
Quark's spelling of a configuration: one description for all layers, others for names and classes, and exclusions.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quantplug.config import Dialect, Field, QuantConfig
from quantplug.entries import glob_entries, path_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_list_of_str, get_mapping, get_str
from quantplug.names import GENERIC
from quantplug.skip import EntryKind, Rule
from quantplug_quark.tensors import inputs, kv_cache, quantized, weight_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.skip import SchemeRef
    from quantplug.spec import ActivationSpec

_KNOWN = frozenset({
    "quant_method", "global_quant_config", "layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config",
    "exclude", "export", "algo_config", "softmax_quant_spec",
    # how the file was made
    "quant_mode", "version", "kv_cache_post_rope", "pre_optimization_configs", "pre_quant_opt_config",
    "log_severity_level",
})  # fmt: skip
_LAYER_KEYS = frozenset({"weight", "bias", "input_tensors", "output_tensors", "target_device"})
_ONLINE = ("online_r1_rotation", "r3", "r4")
"""Rotations that the model must perform while it runs."""
_LINEAR = "Linear"


class QuarkDialect(Dialect):
    """Reads Quark configurations."""

    name = "quark"
    methods = ("quark",)

    def parse(self, raw: RawConfig) -> QuantConfig:
        """
        Turn the fields into rules: exclusions first, then single names, then patterns; the rest has the global scheme.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`, `QP-CFG-CONTRADICTION`, `QP-SKIP-PATTERN`.
        """
        reader = _Reader(raw)
        reader.check_meaning()
        rules = [Rule(entry) for entry in path_entries(raw.fields.get("exclude"), raw.origin("exclude"))]
        cache = reader.kv_cache()
        default = reader.default()
        rules += reader.layers()
        return QuantConfig(
            self.name,
            default,
            tuple(rules),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
            tuple(dict.fromkeys(reader.notes)),
            kv_cache=cache,
        )


class _Reader:
    """Reads the parts of one configuration and collects what a person should know about them."""

    def __init__(self, raw: RawConfig) -> None:
        self.notes = [
            f"{raw.origin(key)} is not known to this reader and left out of account"
            for key in raw.fields
            if key not in _KNOWN
        ]
        self._raw = raw
        self._export = self._object("export")
        self._cache_keys: frozenset[str] = frozenset()

    def _object(self, key: str) -> dict[str, Json]:
        if self._raw.fields.get(key) is None:
            return {}
        return get_mapping(self._raw.fields, key, self._raw.origin(key))

    def check_meaning(self) -> None:
        """Refuse what would make the stored tensors mean something else."""
        origin = self._raw.origin("export")
        form = get_str(self._export, "weight_format", f"{origin}.weight_format", default="real_quantized")
        if form != "real_quantized":
            raise _refused(
                f"{origin}.weight_format",
                f"is {form!r}: the weights are stored dense, and rounded while the model runs",
                "'real_quantized'",
            )
        algorithms = self._raw.fields.get("algo_config") or []
        for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
            if isinstance(algorithm, dict) and any(algorithm.get(key) for key in _ONLINE):
                raise _refused(
                    self._raw.origin("algo_config"),
                    f"{algorithm.get('name')} rotates inputs while the model runs",
                    "rotations that are merged into the weights",
                )
        if quantized(self._raw.fields.get("softmax_quant_spec")):
            self.notes.append(f"{self._raw.origin('softmax_quant_spec')}: attention keeps its precision")

    def default(self) -> SchemeRef | None:
        """Return the scheme of linear layers that no name speaks of: that of their class, else the global one."""
        origin = self._raw.origin("layer_type_quant_config")
        types = self._object("layer_type_quant_config")
        for name in types:
            where = f"{origin}.{name}"
            fields = self._layer(types, name, origin)
            if name != _LINEAR and quantized(fields.get("weight")):
                raise _refused(where, f"modules of class {name} are quantized", "linear layers only")
        if _LINEAR in types:
            return self._use(self._layer(types, _LINEAR, origin), f"{origin}.{_LINEAR}")
        key = "global_quant_config"
        if key not in self._raw.fields:
            raise ConfigError(
                "QP-CFG-FIELD", self._raw.where, f"{key} is missing", expected="an object, or null",
                fix="The file is incomplete; ask its maker.",
            )  # fmt: skip
        if self._raw.fields[key] is None:
            return None
        return self._use(self._layer(self._raw.fields, key, self._raw.where), self._raw.origin(key))

    def layers(self) -> list[Rule]:
        """Return a rule for every key of `layer_quant_config`; a whole name counts before any pattern."""
        key = "layer_quant_config"
        origin, layers = self._raw.origin(key), self._object(key)
        entries = glob_entries(list(layers), origin)
        rules = []
        for entry in sorted(entries, key=lambda entry: entry.kind is EntryKind.GLOB):
            where = f"{origin}[{entry.text!r}]"
            # Engines that quantize the cache may quantize queries, too; the scale is stored likewise.
            cache = entry.text in self._cache_keys or entry.text.endswith("q_proj")
            use = self._use(self._layer(layers, entry.text, origin), where, cache=cache)
            if use is not None and entry.pattern.rpartition(".")[2].lstrip("*") in GENERIC.embeddings:
                raise _refused(where, f"{entry.text} is an embedding", "linear layers only")
            rules.append(Rule(entry, use))
        return rules

    def kv_cache(self) -> ActivationSpec | None:
        """Return what cached keys and values are: the outputs of the projections that `kv_cache_group` names."""
        origin = self._raw.origin("export")
        group: tuple[str, ...] = ()
        if self._export.get("kv_cache_group") is not None:
            group = get_list_of_str(self._export, "kv_cache_group", f"{origin}.kv_cache_group")
        found = self._outputs("layer_quant_config", group) | self._outputs("kv_cache_quant_config", ("*",))
        self._cache_keys = frozenset(key for section, key in found if section == "layer_quant_config")
        if group and not found:
            raise ConfigError(
                "QP-CFG-CONTRADICTION",
                f"{origin}.kv_cache_group",
                "names projections whose outputs are nowhere said to be quantized",
                expected=f"layer_quant_config with output_tensors for {', '.join(group)}",
            )
        specs = {where: kv_cache(value, where) for where, value in found.values()}
        first, *others = specs.items() or [("", None)]
        for where, spec in others:
            if spec != first[1]:
                raise ConfigError(
                    "QP-CFG-CONTRADICTION", where, "describes another cache than " + first[0],
                    expected="the same for keys and values",
                )  # fmt: skip
        return first[1]

    def _outputs(self, section: str, patterns: Sequence[str]) -> dict[tuple[str, str], tuple[str, Json]]:
        """Return where and how the outputs of some layers are quantized."""
        layers, origin = self._object(section), self._raw.origin(section)
        named = [key for key in layers if any(key == p or fnmatchcase(key, p) for p in patterns)]
        outputs = {key: self._layer(layers, key, origin).get("output_tensors") for key in named}
        return {
            (section, key): (f"{origin}[{key!r}].output_tensors", value)
            for key, value in outputs.items()
            if quantized(value)
        }

    def _layer(self, layers: Mapping[str, Json], key: str, origin: str) -> Mapping[str, Json]:
        fields = get_mapping(layers, key, origin)
        unknown = sorted(name for name in fields.keys() - _LAYER_KEYS if fields[name])
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                f"{origin}[{key!r}].{unknown[0]}",
                f"is {describe_json(fields[unknown[0]])}, which may change what the tensors mean",
                expected=f"only {', '.join(sorted(_LAYER_KEYS))}",
            )
        return fields

    def _use(self, fields: Mapping[str, Json], where: str, *, cache: bool = False) -> SchemeRef | None:
        """Return the scheme that a layer's description means, None when its weight stays whole."""
        for key in ("bias",) if cache else ("bias", "output_tensors"):
            if quantized(fields.get(key)):
                raise _refused(f"{where}.{key}", f"the {key.removesuffix('_tensors')} is quantized", "null")
        if not quantized(fields.get("weight")):
            return None
        activation, note = inputs(fields.get("input_tensors"), f"{where}.input_tensors")
        if note:
            self.notes.append(note)
        return weight_scheme(fields.get("weight"), activation, f"{where}.weight")


def _refused(where: str, what: str, expected: str) -> ConfigError:
    return ConfigError(
        "QP-CFG-REFUSED",
        where,
        what,
        expected=expected,
        fix="Use a copy of the model in another form, or convert the dense model (quantplug convert).",
    )
