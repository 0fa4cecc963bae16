"""
The experts of a bare checkpoint as modules: one for each layer, with every projection of every expert among its shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError, ConfigError, list_names
from quantplug.evidence import BIAS_SUFFIX
from quantplug.expertnames import ExpertIndex, stacked_files
from quantplug.expertrules import ExpertLayer
from quantplug.jsonio import describe_json
from quantplug.sections import CONFIG_FILE

if TYPE_CHECKING:
    from quantplug.evidence import StoredModules
    from quantplug.expertrules import ExpertFiles, ExpertRules
    from quantplug.jsonio import Json
    from quantplug.moe import ExpertFunction, FunctionName

_FUNCTIONS: Mapping[str, FunctionName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""How config.json spells functions, as Transformers names them."""


class ExpertContainers:
    """
    The containers of a checkpoint, and what config.json says about their experts.

    Args:
        stored: its tensors by module.
        rules: how the family spells experts.
        model_config: its config.json.
    """

    def __init__(self, stored: StoredModules, rules: ExpertRules, model_config: Mapping[str, Json]) -> None:
        self._stored = stored
        self._rules = rules
        self._config = model_config
        self._index = ExpertIndex(stored.paths, rules)
        self._layers: dict[ExpertFiles, ExpertLayer] = {}

    def place(self, path: str) -> str:
        """Return the path of the module that a stored path belongs to: the container of an expert, else itself."""
        container = self._index.container_of(path)
        return path if container is None or self._index.files_of(container) is None else container

    def layer(self, path: str) -> ExpertLayer | None:
        """
        Return the experts of a container; None for any other path, and where no rule says how they lie.

        Raises:
            ConfigError: `QP-CFG-FIELD` when config.json does not say what must be known.
            CheckpointError: `QP-ST-MISSING` where each expert has a weight, and all of them together the scales.
        """
        files = self._index.files_of(path)
        if path in self._index.stacked:
            if files is not None:
                self._refuse_split(path)
            else:
                files = stacked_files(self._stored.tensors(path), self._rules)
        if files is None:
            return None
        if files not in self._layers:
            self._layers[files] = ExpertLayer(
                self._number(self._rules.count, "how many experts a layer has"),
                self._number(self._rules.top_k, "how many experts a row is sent to"),
                replace(self._function(), gated=files.gated),
                files,
                self._rules.router_weight_on_input,
            )
        return self._layers[files]

    def shards(self, path: str, layer: ExpertLayer) -> tuple[str, ...]:
        """Return the path of every projection of every expert, expert by expert, stored or not."""
        names = layer.files.projections
        if layer.files.stacked:
            return tuple(f"{path}.{name}" for name in names)
        return tuple(f"{path}.{expert}.{name}" for expert in range(layer.count) for name in names)

    def has_bias(self, path: str, layer: ExpertLayer) -> bool:
        """Whether the first stored projection has a bias."""
        if layer.files.stacked:
            return any(
                ending.suffix == BIAS_SUFFIX and name in self._stored.tensors(path)
                for name, (_, ending) in layer.files.stacked_names.items()
            )
        return any(BIAS_SUFFIX in self._stored.tensors(shard) for shard in self.shards(path, layer))

    def _refuse_split(self, path: str) -> None:
        """Raise where weights are stored one by one and what belongs to them in one tensor."""
        named = {name: end for files in self._rules.files if files.stacked for name, end in files.stacked_names.items()}
        parts = [name for name in self._stored.tensors(path) if name in named and named[name][1].suffix != BIAS_SUFFIX]
        if parts:
            raise CheckpointError(
                "QP-ST-MISSING",
                path,
                f"holds {list_names(parts)} of all experts together, while each expert has a weight of its own",
                expected="both one by one, or both together",
                fix="Its writer split weights when it saved and not what belongs to them, and cannot read that back; "
                "save_pretrained(…, save_original_format=False) keeps both together.",
            )

    def _number(self, keys: tuple[str, ...], what: str) -> int:
        for part in self._parts():
            for key in keys:
                value = part.get(key)
                if value is None:
                    continue
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(
                        "QP-CFG-FIELD", f"{CONFIG_FILE}: {key}", f"is {describe_json(value)}",
                        expected="a positive number",
                    )  # fmt: skip
                return value
        raise ConfigError(
            "QP-CFG-FIELD",
            CONFIG_FILE,
            f"does not say {what}, and the files hold experts",
            expected=f"one of {', '.join(keys)}",
            fix="Without it a missing expert could not be told from one that never was.",
        )

    def _function(self) -> ExpertFunction:
        rules, function = self._rules, self._rules.function
        limit, alpha = self._measure(rules.limit_field), self._measure(rules.alpha_field)
        function = function if limit is None else replace(function, limit=limit)
        function = function if alpha is None else replace(function, alpha=alpha)
        value = self._field(rules.function_field)
        if value is None:
            return function
        if not isinstance(value, str) or value not in _FUNCTIONS:
            raise ConfigError(
                "QP-CFG-FIELD", f"{CONFIG_FILE}: {rules.function_field}", f"is {describe_json(value)}",
                expected=f"one of {', '.join(_FUNCTIONS)}",
            )  # fmt: skip
        return replace(function, name=_FUNCTIONS[value])

    def _measure(self, key: str) -> float | None:
        """Return a positive number of config.json, None where it says nothing."""
        value = self._field(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(
                "QP-CFG-FIELD", f"{CONFIG_FILE}: {key}", f"is {describe_json(value)}", expected="a positive number"
            )
        return float(value)

    def _field(self, key: str) -> Json:
        """Return what config.json says under a key, None where it says nothing; a text model's own part counts last."""
        return next((part[key] for part in self._parts() if key and part.get(key) is not None), None)

    def _parts(self) -> list[Mapping[str, Json]]:
        parts = (self._config, self._config.get("text_config"))
        return [part for part in parts if isinstance(part, Mapping)]
