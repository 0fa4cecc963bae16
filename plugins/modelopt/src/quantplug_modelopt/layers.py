"""
The layers of a mixed file, and whether the groups that ModelOpt writes for other tools say what the algorithm says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.entries import glob_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json, get_int, get_list_of_str, get_mapping
from quantplug.names import GENERIC
from quantplug.skip import Rule
from quantplug_modelopt.algorithms import MIXED, algorithm
from quantplug_modelopt.description import MEANING, refuse_meaning

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug_modelopt.algorithms import Algorithm
    from quantplug_modelopt.description import Description, Stated

_LAYER_KEYS = frozenset({"quant_algo", "group_size", *MEANING})


def layer_rules(found: Description) -> list[Rule]:
    """
    Return a rule for each entry of `quantized_layers`, the one with the longest path first.

    A path names a layer, or a parent of layers that share an algorithm (experts).

    Raises:
        ConfigError: `QP-CFG-FIELD` when there is no such list, `QP-CFG-UNKNOWN` for a key that is not read, and what
            `algorithm` raises.
    """
    if found.layers is None or not isinstance(found.layers.value, dict) or not found.layers.value:
        raise ConfigError(
            "QP-CFG-FIELD",
            found.algo.origin,
            f"quant_algo is {MIXED!r}, and no quantized_layers says which layers are quantized",
            expected="quantized_layers: an object of layer paths",
            fix="The file is incomplete; download it again or ask its maker.",
        )
    layers, origin = found.layers.value, found.layers.origin
    entries = glob_entries(sorted(layers, key=lambda path: -path.count(".")), origin)
    rules = []
    for entry in entries:
        where = f"{origin}[{entry.text!r}]"
        if entry.pattern.rpartition(".")[2] in GENERIC.embeddings:
            raise _embedding(where, entry.text)
        rules.append(Rule(entry, _layer(get_mapping(layers, entry.text, where), where).scheme))
    return rules


def _layer(fields: Mapping[str, Json], where: str) -> Algorithm:
    unknown = sorted(fields.keys() - _LAYER_KEYS)
    if unknown:
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            f"{where}.{unknown[0]}",
            f"{unknown[0]} is {describe_json(fields[unknown[0]])}, which may change what the tensors of the layer mean",
            expected=f"only {', '.join(sorted(_LAYER_KEYS))}",
            fix="A newer quantplug may know it; otherwise ask the maker of the checkpoint what it means.",
        )
    stored = algorithm(fields.get("quant_algo"), f"{where}.quant_algo")
    for key in MEANING:
        refuse_meaning(key, fields.get(key), f"{where}.{key}")
    size = fields.get("group_size")
    check_size(stored, None if size is None else get_int(fields, "group_size", where, minimum=0) or None, where)
    return stored


def check_size(stored: Algorithm, size: int | None, where: str) -> None:
    """
    Check a stated `group_size` against the one that the algorithm fixes; where it fixes none, any is bookkeeping.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    if size is not None and stored.group_size and size != stored.group_size:
        raise ConfigError(
            "QP-CFG-FIELD",
            where,
            f"group_size is {size}",
            expected=f"{stored.group_size}, which the format fixes",
            fix="The file is of another format than its quant_algo says; ask its maker.",
        )


def check_groups(groups: Stated | None, stored: Algorithm) -> None:
    """
    Check that `config_groups`, which repeats the algorithm in the words of another tool, does not contradict it.

    Raises:
        ConfigError: `QP-CFG-FIELD` for a value of a wrong type, `QP-CFG-CONTRADICTION` when it differs,
            `QP-CFG-REFUSED` when embeddings are quantized.
    """
    if groups is None or not isinstance(groups.value, dict):
        return
    for name in groups.value:
        where = f"{groups.origin}.{name}"
        group = get_mapping(groups.value, name, groups.origin)
        for target in get_list_of_str(group, "targets", where, default=()):
            if target == "Embedding":
                raise _embedding(f"{where}.targets", target)
        weights = get_mapping(group, "weights", where)
        stated = {key: weights[key] for key in ("num_bits", "type", "group_size") if weights.get(key) is not None}
        said: dict[str, Json] = {"num_bits": stored.bits, "type": stored.kind, "group_size": stored.group_size}
        for key, value in stated.items():
            if value != said[key] and (key != "group_size" or stored.group_size):
                raise _contradiction(f"{where}.weights.{key}", describe_json(value), describe_json(said[key]))
        quantizes = group.get("input_activations") is not None
        if quantizes != stored.activations:
            words = {True: "quantized activations", False: "weights only"}
            raise _contradiction(f"{where}.input_activations", words[quantizes], words[stored.activations])


def _contradiction(where: str, what: str, said: str) -> ConfigError:
    return ConfigError(
        "QP-CFG-CONTRADICTION",
        where,
        f"means {what}, while quant_algo means {said}",
        expected="the same in both",
        fix="Find out which one describes the tensors, and correct the other.",
    )


def _embedding(where: str, name: str) -> ConfigError:
    return ConfigError(
        "QP-CFG-REFUSED",
        where,
        f"{name} is an embedding, which is never given the scheme of a linear layer",
        expected="linear layers",
        fix="Use a copy of the model whose embedding stayed whole.",
    )
