"""
Tiny mixtures of experts of the real transformers classes, filled from a seed, written as dense checkpoints.

    OMP_NUM_THREADS=1 /tmp/witness/venvs/hf/bin/python tests/witness/moe_models.py /tmp/witness [FAMILY ...]

Checkpoints go to OUT/ckpt/dense-moe-FAMILY in BF16, in the names that transformers 5.23.0 writes, with a tokenizer
whose word `tN` is token N. Every tensor is random, norms, biases and routers included, so that no two of a model can
be mistaken for each other, and matrices keep the size of what passes through, so that routers have an opinion.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, EXPERTS, TOP_K, WORDS = 256, 8, 2, 512
SHARED: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEXT_N = {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_mtp_layers": 1, "routed_scaling_factor": 1.5}

# family: (model class, configuration class, what the configuration says beside SHARED)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"head_dim": 64, "intermediate_size": 256, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **NEXT_N,
            "num_mtp_layers": 0,
            "num_key_value_heads": 4,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **NEXT_N,
            "head_dim": 64,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "use_qk_norm": True,
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "head_dim": 64,
            "intermediate_size": 128,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "sliding_window": 16,
            "max_position_embeddings": 131072,
            "swiglu_limit": 1.5,  # small enough to matter here
        },
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "final_logit_softcapping": 30.0,
        },
    ),
}


SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
FEW = 3
OWN_SMALL: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"head_dim": 32, "moe_intermediate_size": 32, "num_experts": FEW},
    "mixtral": {"head_dim": 32, "intermediate_size": 32, "num_local_experts": FEW},
    "gpt-oss": {"head_dim": 32, "intermediate_size": 32, "num_local_experts": FEW},
    "gemma4": {
        "head_dim": 32,
        "global_head_dim": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_experts": FEW,
        "layer_types": ["full_attention"],
    },
}
"""What else says that a model is small enough to be kept with the tests: hidden 64, one layer, three experts of 32."""

FAMILIES |= {f"{f}-small": (*FAMILIES[f][:2], {**FAMILIES[f][2], **SMALL, **own}) for f, own in OWN_SMALL.items()}


def filled(name: str, like: torch.Tensor, generator: torch.Generator, inputs: int = -1) -> torch.Tensor:
    """Return random values like a tensor: near one for norms and scalars, small for biases, else scaled by an axis."""
    values = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if "bias" in name or "sinks" in name:
        return (0.2 * values).to(like.dtype)
    if like.ndim < 2:
        return (1 + 0.1 * values).to(like.dtype)
    return (values * like.shape[inputs] ** -0.5).to(like.dtype)


def next_n_layer(state: dict[str, torch.Tensor], layers: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the next-N layer that GLM-4-MoE files carry after the last one, in their names; transformers drops it."""
    last, here = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    like = {here + name.removeprefix(last): tensor for name, tensor in state.items() if name.startswith(last)}
    like[f"{here}embed_tokens.weight"] = state["model.embed_tokens.weight"]
    like[f"{here}shared_head.head.weight"] = state["lm_head.weight"]
    like[f"{here}shared_head.norm.weight"] = like[f"{here}enorm.weight"] = state["model.norm.weight"]
    like[f"{here}hnorm.weight"] = state["model.norm.weight"]
    like[f"{here}eh_proj.weight"] = torch.empty(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16)
    return {name: filled(name, tensor, generator) for name, tensor in sorted(like.items())}


def tokenizer() -> Any:
    """Return a tokenizer with one word a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(WordLevel({f"t{number}": number for number in range(WORDS)}, unk_token="t3"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="t3", bos_token="t1", eos_token="t2", pad_token="t0"
    )


def write(family: str, target: Path) -> None:
    """Write the dense checkpoint of one family."""
    import transformers

    model_class, config_class, own = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**SHARED, **own})
    config.architectures = [model_class]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(len(family) * 1000 + ord(family[0]))
    with torch.no_grad():
        for name, tensor in sorted({**dict(model.named_parameters()), **persistent(model)}.items()):
            transposed = family.startswith("gpt-oss") and tensor.ndim == 3  # its experts are [experts, in, out]
            tensor.copy_(filled(name, tensor, generator, -2 if transposed else -1))
    model.tie_weights()
    model.save_pretrained(target)
    if family == "glm4-moe":
        file = target / "model.safetensors"
        state = load_file(file)
        state.update(next_n_layer(state, config.num_hidden_layers, generator))
        save_file(state, file, metadata={"format": "pt"})
    tokenizer().save_pretrained(target)


def persistent(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that a checkpoint has."""
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def main() -> None:
    """Write every family named, or all of them."""
    out = Path(sys.argv[1]).resolve()
    for family in sys.argv[2:] or FAMILIES:
        target = out / "ckpt" / f"dense-moe-{family}"
        if not target.exists():
            write(family, target)
        state = load_file(target / "model.safetensors")
        shown = {name: f"{t.dtype} {list(t.shape)}" for name, t in sorted(state.items()) if ".experts.1" not in name}
        print(family, sum(t.numel() for t in state.values()), json.dumps(shown, indent=1), flush=True)


if __name__ == "__main__":
    main()
