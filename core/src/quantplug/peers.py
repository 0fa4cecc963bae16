"""
The hook of another engine's rules: which layers it would quantize, given the same configuration.

Nothing here runs that engine. `lint` asks such readers so that a checkpoint that two engines read differently is known
before anybody serves it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from quantplug.jsonio import Json

PeerAnswer = Literal["quantized", "dense", "error"]
"""What an engine makes of a layer: a quantized one, one left whole, or a refusal to load the model."""

PeerRules = Callable[[str, str], PeerAnswer | None]
"""From a module path and its class name to the answer; None where the rules that are known say nothing certain."""


class PeerReader(ABC):
    """
    The rules of one release of another engine; a plugin's `quantplug_peers` returns instances.

    Pure: the same answer on any machine, and no import of that engine.
    """

    name: ClassVar[str]
    """Unique among installed plugins."""
    version: ClassVar[str]
    """The release whose rules these are."""
    fuses: ClassVar[bool] = False
    """Whether it runs the shards of an attention's or MLP's input projections as one layer, under the fused name."""

    @abstractmethod
    def reading(self, method: str, section: Mapping[str, Json]) -> PeerRules | None:
        """
        Return the rules that a configuration comes to, None when its method is not one whose rules are known.

        Called once per checkpoint; the rules are then asked once per module, and never raise.

        Args:
            method: the normalised `quant_method`.
            section: the quantization section of the checkpoint, its neighbours merged in; may hold anything.
        """

    def decides(self, method: str, section: Mapping[str, Json], path: str, class_name: str = "") -> PeerAnswer | None:
        """Return the answer for one module; None when it is not known."""
        rules = self.reading(method, section)
        return None if rules is None else rules(path, class_name)
