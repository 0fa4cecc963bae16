"""
The fields of FP8 configurations, read with their types, and the rules that follow from lists of layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.entries import only_rules, path_entries
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.names import GENERIC
from quantplug.skip import Entry, EntryKind, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.config import RawConfig
    from quantplug.jsonio import Json
    from quantplug.skip import SchemeRef

_LARGEST_SIDE = 1 << 20
_SKIP_LISTS = ("modules_to_not_convert", "ignored_layers")
POSITIVE_LISTS = ("block_name_to_quantize", "to_quant_block_names")
"""Keys of auto-round that name what is quantized."""


def block_size(raw: RawConfig) -> tuple[int, int] | None:
    """
    Return `weight_block_size` as rows and inputs of a block, None when it is null or absent.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    key = "weight_block_size"
    value = raw.fields.get(key)
    if value is None:
        return None
    sides = value if isinstance(value, list) else []
    numbers = [side for side in sides if type(side) is int and 0 < side <= _LARGEST_SIDE]
    if len(sides) != 2 or len(numbers) != 2:
        raise ConfigError(
            "QP-CFG-FIELD",
            raw.origin(key),
            f"{key} is {describe_json(value)}" + (f" ({', '.join(map(describe_json, sides[:4]))})" if sides else ""),
            expected=f"two integers from 1 to {_LARGEST_SIDE}, rows and inputs of a block, or null",
        )
    return numbers[0], numbers[1]


def word(raw: RawConfig, key: str, meanings: Mapping[str, str], default: str) -> str:
    """
    Return what a text field means; upper and lower case are the same, since readers fold them.

    Args:
        raw: the configuration.
        key: the field.
        meanings: text in lower case -> what it means.
        default: the text of an absent field.

    Raises:
        ConfigError: `QP-CFG-FIELD`.
    """
    value = raw.fields.get(key, default)
    text = value.lower() if isinstance(value, str) else ""
    if text not in meanings:
        raise ConfigError(
            "QP-CFG-FIELD",
            raw.origin(key),
            f"{key} is {describe_json(value)}",
            expected=f"one of {', '.join(map(repr, meanings))}",
        )
    return meanings[text]


def layer_rules(raw: RawConfig) -> tuple[Rule, ...]:
    """
    Return the rules of the lists of layers that stay whole, and that of the output head.

    Two spellings of the list are in use; engines differ in which of them they read first. The head stays whole in all
    readers that are told nothing else; where a file stores it quantized, its tensors say so.

    Raises:
        ConfigError: `QP-CFG-CONTRADICTION` when both lists are there and differ; `QP-CFG-FIELD`, `QP-SKIP-PATTERN`.
    """
    lists = {key: path_entries(raw.fields.get(key), raw.origin(key)) for key in _SKIP_LISTS if raw.fields.get(key)}
    if len({frozenset(entry.text for entry in entries) for entries in lists.values()}) > 1:
        one, two = (raw.origin(key) for key in lists)
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            two,
            f"lists other layers than {one}",
            expected="the same in both, or one of them",
            fix="Both name the layers that stay whole; remove the one that is wrong.",
        )
    entries = next(iter(lists.values()), ())
    # Layers may have an `output` of their own, so that only the model's counts.
    heads = ((name, EntryKind.EXACT if name == "output" else EntryKind.SUFFIX) for name in GENERIC.heads)
    implied = (Entry(name, kind, name, raw.where, implied=True) for name, kind in heads)
    return tuple(Rule(entry) for entry in (*entries, *implied))


def positive_rules(raw: RawConfig, use: SchemeRef) -> tuple[Rule, ...]:
    """
    Return the rules of lists that name the only blocks that are quantized, texts with commas or lists.

    Raises:
        ConfigError: `QP-CFG-FIELD`, `QP-SKIP-PATTERN`.
    """
    rules: list[Rule] = []
    for key in POSITIVE_LISTS:
        value = raw.fields.get(key)
        texts = [text for text in value.split(",") if text.strip()] if isinstance(value, str) else value
        rules += only_rules(texts, use, raw.origin(key))
    return tuple(rules)


def agree(raw: RawConfig, key: str, values: Sequence[Json], because: str) -> None:
    """
    Check that a key, if it is there, repeats what another one says.

    Args:
        raw: the configuration.
        key: the key.
        values: what it may be; true is not 1.
        because: what the other key says, for the message.

    Raises:
        ConfigError: `QP-CFG-CONTRADICTION`.
    """
    value = raw.fields.get(key)
    if value is None or any(type(value) is type(allowed) and value == allowed for allowed in values):
        return
    raise ConfigError(
        "QP-CFG-CONTRADICTION",
        raw.origin(key),
        f"{key} is {describe_json(value)}, beside {because}",
        expected=" or ".join(map(repr, values)),
        fix="Find out which one describes the tensors, and correct or remove the other.",
    )


def refuse_meaning(raw: RawConfig, harmless: Mapping[str, Sequence[Json]]) -> None:
    """
    Refuse keys that change what the tensors mean in a way that is not read.

    Args:
        raw: the configuration.
        harmless: key -> values that change nothing, besides null, false and what is empty.

    Raises:
        ConfigError: `QP-CFG-UNKNOWN`.
    """
    for key, values in harmless.items():
        value = raw.fields.get(key)
        if value is None or value is False or value in ({}, [], "") or value in values:
            continue
        raise ConfigError(
            "QP-CFG-UNKNOWN",
            raw.origin(key),
            f"{key} is {describe_json(value)}, which changes what the tensors mean in a way that is not read",
            expected=" or ".join(map(repr, values)) if values else "none",
            fix="Use a copy of the model in plain FP8 form, or convert the dense model (quantplug convert).",
        )


def unknown_keys(raw: RawConfig, known: frozenset[str]) -> list[str]:
    """Return notes about keys that nobody here has heard of."""
    return [
        f"{raw.origin(key)} is not known to this reader and left out of account"
        for key in raw.fields
        if key not in known
    ]
