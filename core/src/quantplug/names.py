"""
Checkpoint name rules of a model family, as data.

A bare checkpoint has tensor names, not modules; these rules say which of them is an embedding, the output head, or
tied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quantplug.expertrules import ExpertRules
from quantplug.renames import NameMap


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    The name rules of one family.

    Attributes:
        name: "llama".
        model_types: values of config.json `model_type` it answers to; () is the generic fallback.
        embeddings: dotted suffixes of module paths that are embeddings, that of the vocabulary first.
        heads: dotted suffixes of module paths that are the output head, outside numbered layers; the first of them is
            tied to the vocabulary's embedding when the files have none and `tie_word_embeddings` is set.
        layer_heads: those of further output heads, within numbered layers: those of a layer that drafts the next token.
        fused: (fused last name, shard last names) for engines that fuse, such as ("qkv_proj", ("q_proj", …)).
        absent: (last name of a shard that some layers do not store, that of the one whose values stand in for it).
        routers: dotted suffixes of module paths that choose experts; nothing quantizes them unless the file says so.
        experts: how its routed experts are spelled.
        extras: names of further tensors that linear modules of the family may own (a router's bias for the choice).
        layers: paths that numbered layers lie in; those from `num_hidden_layers` on draft tokens for the others.
        renames: from module paths in the family's files to those of Transformers' model, as far as rules can say it.
    """

    name: str
    model_types: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = (
        "embed_tokens",
        "wte",
        "word_embeddings",
        "tok_embeddings",
        "embed_in",
        "embeddings",
        "wpe",
        "embed_positions",
        "position_embeddings",
        "token_type_embeddings",
    )
    heads: tuple[str, ...] = ("lm_head", "embed_out", "output")
    layer_heads: tuple[str, ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    )
    absent: tuple[tuple[str, str], ...] = ()
    routers: tuple[str, ...] = (
        "mlp.gate",
        "block_sparse_moe.gate",
        "feed_forward.gate",
        "router",
        "router.proj",
        "shared_expert_gate",
    )
    experts: ExpertRules = field(default_factory=ExpertRules)
    extras: tuple[str, ...] = ("e_score_correction_bias",)
    layers: tuple[str, ...] = ("model.layers", "model.language_model.layers", "transformer.h")
    renames: NameMap = field(default_factory=NameMap)


GENERIC = Architecture("generic")
"""What holds for a family that nobody has described."""
