"""
Quantizing a dense checkpoint while it is loaded: the caller's wish as a configuration, and what a name suggests.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantplug.card import CARD, FILE, recipe_on_card, recipes_on_card
from quantplug.config import Field, QuantConfig
from quantplug.errors import ConfigError
from quantplug.evidence import DENSE_SUFFIX
from quantplug.names import GENERIC
from quantplug.sections import CALLER
from quantplug.skip import SCHEMED, Entry, EntryKind, Rule, SchemeRef

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from quantplug.jsonio import Json
    from quantplug.plan import Plan
    from quantplug.registry import Registry


@dataclass(frozen=True, slots=True)
class OnLoad:
    """
    The wish to quantize dense weights while they are loaded.

    Attributes:
        recipe: name of the grid, one of `Registry.recipes` ("int4-g32", "fp8", "mxfp8", "q4_0"); or "card" for the one
            that the metadata of the model card names.
        skip: layers to leave whole; the output head and routers are left whole in any case.
    """

    recipe: str
    skip: tuple[Entry, ...] = ()

    def scheme(self, registry: Registry) -> SchemeRef:
        """Return what the recipe stands for; raises `PluginError` (`QP-PLUG-MISSING`, `QP-PLUG-CONFLICT`)."""
        recipe = registry.recipe(self.recipe).item
        return SchemeRef(recipe.scheme, tuple(sorted(recipe.params.items())))


def on_load_config(wish: OnLoad, directory: Path, registry: Registry) -> QuantConfig:
    """
    Return the configuration of a dense checkpoint whose linear layers are quantized as the caller wishes.

    Raises:
        PluginError: `QP-PLUG-MISSING`, `QP-PLUG-CONFLICT` about the recipe.
        ConfigError: `QP-CFG-OVERRIDE` when it is left to the card, and the card does not say.
    """
    origin = CALLER
    if wish.recipe == CARD:
        wish, origin = replace(wish, recipe=recipe_on_card(directory, registry.recipes)), f"{FILE}: metadata"
    whole = {"output heads stay whole": GENERIC.heads, "routers stay whole": GENERIC.routers}
    implied = (Entry(name, EntryKind.SUFFIX, name, why, implied=True) for why, names in whole.items() for name in names)
    return QuantConfig(
        dialect="",
        default=wish.scheme(registry),
        rules=tuple(Rule(entry) for entry in (*wish.skip, *implied)),
        fields=(Field("quantize", wish.recipe, origin),),
        on_load=True,
    )


def confirm(wish: OnLoad, config: QuantConfig, registry: Registry) -> None:
    """
    Check that a wish to quantize says what an already quantized checkpoint is.

    Raises:
        ConfigError: `QP-CFG-CONTRADICTION` when it says anything else.
    """
    if wish.skip or wish.scheme(registry) != config.default:
        raise ConfigError(
            "QP-CFG-CONTRADICTION",
            f"{CALLER}: quantize",
            f"{wish.recipe!r} is asked for, and the checkpoint is already quantized by {config.dialect}"
            + ("" if config.default is None else f" ({config.default.name})"),
            expected="a dense checkpoint, or no such wish",
            fix="Leave quantize out to run the checkpoint as it is; to get another format, start from dense weights.",
        )


def suggested_grid(directory: Path, model: Mapping[str, Json], registry: Registry) -> tuple[str, ...]:
    """
    Return a remark where the card or the name of a dense checkpoint suggests a grid that its weights were trained for.

    Nothing follows from either; the caller decides.
    """
    for recipe in recipes_on_card(directory, registry.recipes):
        return (f"the model card names the grid {recipe!r}; the weights are dense and stay so unless you say quantize",)
    named = model.get("_name_or_path")
    for name in (directory.name, named if isinstance(named, str) else ""):
        for recipe in sorted(registry.recipes, key=len, reverse=True):
            if re.search(rf"(?<![a-z0-9]){re.escape(recipe)}(?![a-z0-9])", name.lower()):
                return (
                    f"the name {name!r} suggests weights made for the grid {recipe!r}; they are dense and stay so "
                    f"unless you say quantize={recipe!r}",
                )
    return ()


def written_section(plan: Plan, registry: Registry) -> dict[str, Json]:
    """
    Return the quantization section of the checkpoint that a plan's layers are written as.

    Raises:
        PluginError: `QP-PLUG-MISSING` or `QP-PLUG-CONFLICT` when no dialect, or more than one, describes the format.
    """
    layers = {segment.name: segment.scheme for layer in plan.layers for segment in layer.segments}
    base, _ = Counter(layers.values()).most_common(1)[0]
    whole = [layer for layer in plan.layers if layer.kind in SCHEMED and not layer.quantized]
    ending = f".{DENSE_SUFFIX}"
    dense = [
        name.removesuffix(ending)
        for layer in whole
        for name in layer.tensors or (layer.path + ending,)  # a tied head stores nothing of its own
        if name.endswith(ending)
    ]
    return registry.dialect_writing(base.name).item.write(base, layers, dense)
