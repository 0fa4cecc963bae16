"""
How files spell routed experts: declared rules, never inferred from shapes.

Three things are to be told of a tensor: which layer's experts it belongs to (the container, a module path such as
"model.layers.3.mlp.experts"), which expert and projection it is, and which of a format's tensors it is (the suffix).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quantplug.moe import ExpertFunction

RowOrder = Literal["gate_up", "up_gate", "interleaved"]

BIAS = "bias"


@dataclass(frozen=True, slots=True)
class Ending:
    """
    What one kind of stacked tensor is.

    Attributes:
        text: what follows the projection's name ("", "_scale", "_blocks").
        suffix: name of the tensor in the format that stores it ("weight", "weight_scale").
        transposed: whether the tensor of one expert is stored `[in, out]`.
        flattened: whether its last two axes are one in the format.
        common: whether it is one value for all experts, as a format has it for each, instead of one for each expert.
    """

    text: str
    suffix: str
    transposed: bool = False
    flattened: bool = False
    common: bool = False


_PLAIN_ENDINGS = (Ending("", "weight"), Ending("_bias", BIAS))


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """
    One spelling of experts in files.

    Per expert, a projection is a module: `<container>.<number>.<projection>`, with a tensor for each suffix below it.
    Stacked, it is a tensor of all experts: `<container>.<projection><ending>`, `[E, …]`.

    Attributes:
        down: name of the down projection ("down_proj").
        up: that of the up projection; "" where it is joined with the gate.
        gate: that of the gate; "" where there is none, or it is joined.
        joined: that of gate and up in one, or "".
        order: how the rows of a joined projection follow each other: one half after the other, or alternating with the
            gate first.
        stacked: whether one tensor holds all experts.
        endings: what a stacked tensor is, by how its name ends.
    """

    down: str = "down_proj"
    up: str = "up_proj"
    gate: str = "gate_proj"
    joined: str = ""
    order: RowOrder = "gate_up"
    stacked: bool = False
    endings: tuple[Ending, ...] = _PLAIN_ENDINGS

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the stored projections: those of the first product (gate before up), then down."""
        return tuple(name for name in (self.joined, self.gate, self.up, self.down) if name)

    @property
    def gated(self) -> bool:
        """Whether a gate is stored."""
        return bool(self.joined or self.gate)

    @property
    def stacked_names(self) -> dict[str, tuple[str, Ending]]:
        """Names of the tensors that a container of stacked experts may hold, with (projection, ending) of each."""
        return {
            projection + ending.text: (projection, ending) for projection in self.projections for ending in self.endings
        }


def joined(name: str = "gate_up_proj", down: str = "down_proj", order: RowOrder = "gate_up") -> ExpertFiles:
    """Return the rule for experts of which each stores gate and up as one module."""
    return ExpertFiles(down=down, up="", gate="", joined=name, order=order)


def stacked(
    *endings: Ending, name: str = "gate_up_proj", down: str = "down_proj", order: RowOrder = "gate_up"
) -> ExpertFiles:
    """Return the rule for experts that lie in one tensor each, gate and up joined."""
    return ExpertFiles(down, "", "", name, order, stacked=True, endings=endings or _PLAIN_ENDINGS)


PER_EXPERT = ExpertFiles()
"""`experts.3.gate_proj`, `up_proj`, `down_proj`: what most writers use."""

W123 = ExpertFiles(down="w2", up="w3", gate="w1")
"""`experts.3.w1` (gate), `w3` (up), `w2` (down)."""


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """
    What is known about the routed experts of a family.

    Attributes:
        containers: dotted suffixes of the module paths that experts lie in.
        files: the spellings that occur, tried in this order.
        count: names of the fields of config.json that may say how many experts a layer has.
        top_k: of those that may say how many a row is sent to.
        function: what lies between the products.
        function_field: name of the field that names the function on the gate, "" where the family always has the same.
        limit_field: name of the field with its limit, or "".
        alpha_field: name of the field with its factor within the sigmoid, or "".
        router_weight_on_input: whether the router's weight multiplies x.
        shared: name of the projections' parent (beside the container) that an engine may run as one more expert, or "".
    """

    containers: tuple[str, ...] = ("experts",)
    files: tuple[ExpertFiles, ...] = (PER_EXPERT, W123, joined())
    count: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token")
    function: ExpertFunction = field(default_factory=ExpertFunction)
    function_field: str = "hidden_act"
    limit_field: str = ""
    alpha_field: str = ""
    router_weight_on_input: bool = False
    shared: str = ""


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """
    The routed experts of one layer, as a model has them.

    Attributes:
        count: E.
        top_k: T.
        function: what lies between the products.
        files: how they are stored.
        router_weight_on_input: whether the router's weight multiplies x.
        hidden: H when known from a model, else 0 (then the format tells).
        intermediate: I when known, else 0.
    """

    count: int
    top_k: int
    function: ExpertFunction
    files: ExpertFiles
    router_weight_on_input: bool = False
    hidden: int = 0
    intermediate: int = 0
